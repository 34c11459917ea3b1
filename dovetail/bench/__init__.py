"""What `dovetail bench` measures."""
