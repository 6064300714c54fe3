"""Hooks of Schemathesis: most bodies name the model that is there, and ask for short answers."""

import random

import schemathesis

_LIMITS = {"/completions": "max_tokens", "/chat/completions": "max_tokens", "/responses": "max_output_tokens"}


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    chance = random.Random(repr(sorted(map(str, body))))
    body = dict(body)
    if chance.random() < 0.95:
        body["model"] = "talker"
    limit = _LIMITS.get(context.operation.path)
    if limit and body.get(limit) is None and chance.random() < 0.95:
        body[limit] = 4
    return body
