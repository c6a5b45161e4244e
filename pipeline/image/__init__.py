"""The Apptainer image: building it, the record beside it, comparing two of them.

How a job runs inside an image is `launch/container`.
"""
