"""Configuration of gunicorn that has gevent replace the library in the master, before the application is loaded."""

from gevent import monkey

monkey.patch_all()
