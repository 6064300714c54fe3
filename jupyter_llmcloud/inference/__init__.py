"""A replica: one process that loads one model and answers for it in OpenAI's words on a unix socket.

    __main__    the process: reads its spec from stdin, sets the number of threads
    replica     its life: bind, load, try, ready, drain, exit
    app         the HTTP routes
    openai/     asking: a body to a generation; completion: that, going on; answers: its words; decoding: bodies to
                structs, or a 400 in plain words; prompts and detokenize: text to tokens and back, stop strings
    openai/chat/            histories and templates, formats of tool calls, what of an answer is reasoning or a call
    openai/structured/      grammars that answers follow, by llguidance
    openai/responses_api/   POST /v1/responses: its items, events and store
    loading     a Hugging Face folder to a model that is safe to serve
    engine      the protocol that engines fulfil; engines picks one
    batching, generating              the two engines; sampling is what they share

Imports torch and transformers in loading, batching, generating and sampling only.
"""
