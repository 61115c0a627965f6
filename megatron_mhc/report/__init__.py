"""What a finished or running training tells: curves from TensorBoard, plots, one-line summaries."""
