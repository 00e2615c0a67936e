"""Integrations with Django, Flask and Celery.  Each needs its extra, and no other package imports them."""
