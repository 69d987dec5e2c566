"""`ddsm serve`: segmentation over HTTP, on FastAPI and uvicorn. One Segmenter, some threads, and limits on all else."""
