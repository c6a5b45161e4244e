"""The command line of a process inside the image, and the folders it sees there.

Building images is `pipeline/image`.
"""
