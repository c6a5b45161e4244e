"""The command line of a process inside the image, and the folders that it sees there.

How an image is built is `pipeline/image`.
"""
