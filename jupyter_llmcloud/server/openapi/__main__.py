"""`python -m jupyter_llmcloud.server.openapi` prints the OpenAPI document, for which no server needs to run."""

from __future__ import annotations

import json

from jupyter_llmcloud.server.openapi.document import document
from jupyter_llmcloud.server.routes import ROUTES

if __name__ == "__main__":
    print(json.dumps(document(ROUTES), indent=2))
