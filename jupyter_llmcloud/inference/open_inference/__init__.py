"""Open Inference Protocol v2 for models that are no text generators.

    tensors       named tensors and their datatypes, in JSON and as bytes
    messages      a request and a reply, with the binary tensor data extension
    predictor     the protocol that models fulfil
    batching      rows of many requests computed together
    routes        the HTTP routes of a replica
    text, images  classifiers of transformers; padding decides whether rows of several lengths may share a batch
    modules       any torch.nn.Module by its forward
    python_model  the functions of a cell, or an object

Imports torch and transformers in text, images and modules only.
"""
