"""Access to Redis and Valkey: endpoints, pools, deadlines, errors, keys, locations."""
