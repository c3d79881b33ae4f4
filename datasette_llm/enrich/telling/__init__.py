"""What a person sees of a job: its progress while it runs, its report at the end."""
