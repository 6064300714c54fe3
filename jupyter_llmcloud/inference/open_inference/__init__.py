"""Open Inference Protocol v2 for models that are no text generators.

    tensors       named tensors and their datatypes, in JSON and as bytes
    messages      a request and a reply, with the binary tensor data extension
    predictor     the protocol that models fulfil
    batching      rows of many requests computed together
    routes        the HTTP routes of a replica
    classifiers/  of texts, tokens and images, from transformers
    modules       any torch.nn.Module by its forward
    python_model  the functions of a cell, or an object

Imports torch and transformers in classifiers and modules only.
"""
