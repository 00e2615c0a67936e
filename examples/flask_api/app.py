"""Flask application with an external payment service.

Run it with ``gunicorn --chdir examples/flask_api --workers 4 --worker-class gthread --threads 4 'app:create_app()'``,
and its command with ``flask --app examples/flask_api/app.py breakers``.
"""

import os
import urllib.request

from flask import Flask, current_app

from pybreaker_redis.contrib.flask import Breakers

breakers = Breakers()


@breakers.guard("payments")
def charge() -> str:
    """Call the payment service, and return a receipt.

    Raises:
        OSError: The service failed.
        pybreaker_redis.CircuitOpenError: The circuit is open, so no call was made.
    """
    with urllib.request.urlopen(current_app.config["PAYMENTS_URL"], timeout=5) as answer:
        receipt: str = answer.read().decode()
        return receipt


def create_app() -> Flask:
    """Create the application with settings from the environment."""
    app = Flask(__name__)
    app.config["PAYMENTS_URL"] = os.environ.get("PAYMENTS_URL", "http://localhost:8001/")
    app.config["PYBREAKER_URL"] = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
    app.config["PYBREAKER_PREFIX"] = "api"
    app.config["PYBREAKER_BREAKERS"] = {
        "payments": {
            "fail_max": 3,
            "reset_timeout": float(os.environ.get("RESET_TIMEOUT", "30")),
        },
    }
    breakers.init_app(app)

    @app.get("/pay")
    def pay() -> tuple[dict[str, str], int]:
        try:
            return {"receipt": charge()}, 200
        except OSError:
            return {"detail": "The payment has failed."}, 502

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {}

    return app
