"""What a run writes and shows: metrics, samples, progress, summaries."""
