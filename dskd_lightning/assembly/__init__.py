"""What `DistillationModule` is put together from: its arguments, teachers, checkpoints and figures."""
