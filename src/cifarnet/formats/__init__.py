"""Export formats, a module each, which `cifarnet.export` finds by its name.

Each module has `FILE`, the name of the file or folder that it writes, and two functions:

    write(classifier, images, path, facts)   images: uint8 [2, C, H, W], for tracing; facts: plain data
    load(path, classes)                      returns a function: uint8 [B, C, H, W] on the CPU -> logits
                                             classes: the user's own network classes, if the network is built again
"""
