"""Configuration of gunicorn in which gevent patches the master before the application is loaded."""

from gevent import monkey

monkey.patch_all()
