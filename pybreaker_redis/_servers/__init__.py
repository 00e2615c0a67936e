"""One object for each server of this process: availability and retries."""
