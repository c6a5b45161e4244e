"""The Apptainer image: building it, recording what it was built from, comparing two images.

How a job runs inside an image is `launch/container`.
"""
