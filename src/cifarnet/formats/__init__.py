"""What a trained network can be written as: a module each, which `cifarnet.export` finds by its name.

Each has `FILE`, the name of what it writes, and

    write(classifier, images, path, facts)   images: some to trace it with, uint8 [2, C, H, W]; facts: plain data
    load(path, classes)                      what was written: uint8 [B, C, H, W] on the CPU -> logits [B, num_classes];
                                             classes: of the user's own, for where the network is built again
"""
