"""What a run will do: its layers, learning rates, images and costs, before it is trained."""
