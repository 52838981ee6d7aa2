"""What a run would take, said before it: memory, disk and time. Nothing is written."""
