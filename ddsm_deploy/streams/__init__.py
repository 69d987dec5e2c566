"""Frames that come one after the other: video, cameras, network streams, recordings, and where their masks go."""
