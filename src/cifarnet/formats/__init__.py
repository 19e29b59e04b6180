"""Export formats. Each is a module, which `cifarnet.export` finds by name.

A module defines `FILE`, the name of the file or folder that it writes, and two functions:

    write(classifier, images, path, facts)   images: uint8 [2, C, H, W], for tracing; facts: plain data
    load(path, classes)                      returns a function: uint8 [B, C, H, W] on the CPU -> logits;
                                             classes: the user's own network classes, for formats that use them

A format that changes predictions defines, in place of both:

    write_measured(classifier, data, path, facts, tolerance)   returns what it measured as text, or raises UserError if
                                                               the accuracy on the test images of the data module falls
                                                               by more than `tolerance` points
"""
