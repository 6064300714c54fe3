"""A replica: one process that loads one model and answers for it in OpenAI's words on a unix socket.

    __main__    the process: reads its spec from stdin, sets the number of threads
    replica     its life: bind, load, try, ready, drain, exit
    application the HTTP routes
    answers     one request of a client, from prompt to reply or stream
    openai_requests, openai_replies   what comes in and what goes out, checked and shaped
    prompts, text                     text to tokens, tokens to text, stop strings
    loading     a Hugging Face folder to a model that is safe to serve
    engine      the protocol that engines fulfil; engines picks one
    batching, generating              the two engines; sampling is what they share

Imports torch and transformers in loading, batching, generating and sampling only.
"""
