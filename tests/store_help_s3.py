"""An S3 of our own with one bucket, in a process of its own: prints its port on this machine, then serves."""

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    def log(self, *args: object, **options: object) -> None:
        """Nothing of every request."""


def main() -> None:
    server = make_server(
        "127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True, request_handler=Quiet
    )
    import threading

    threading.Thread(target=server.serve_forever, daemon=True).start()
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.port}").create_bucket(Bucket="bucket")
    print(server.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
