"""A server of its own for a test, and a proxy that notes whatever it is asked to fetch."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager, suppress

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

from chipviz.files import PROJECT


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(home, **environment):
    """`streamlit run app.py` on a free port, ready to answer. Gives the port and its process."""
    port = free_port()
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=os.environ | {"CHIPVIZ_HOME": str(home)} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while status_of(f"http://127.0.0.1:{port}/api/health") != 200:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        yield port, process
    finally:
        process.terminate()
        process.wait(timeout=30)


def status_of(url, method="GET", **headers):
    """The HTTP status of an answer. None if there is none."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError:
        return None


def web_socket(port, origin, host=None):
    """The status line that a server answers to who wants a web socket of its pages."""
    lines = [
        "GET /_stcore/stream HTTP/1.1",
        f"Host: {host or f'127.0.0.1:{port}'}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *([f"Origin: {origin}"] if origin else []),
        "\r\n",
    ]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return connection.recv(200).decode("latin-1").splitlines()[0]


class Tab:
    """A browser's tab as the server sees one: a web socket, its session, and the cookie."""

    def __init__(self, port, socket):
        self._place, self._socket = f"127.0.0.1:{port}", socket
        message = BackMsg()
        message.rerun_script.query_string = ""
        socket.send(message.SerializeToString())
        self.session_id = self._until("new_session").new_session.initialize.session_id

    @classmethod
    @contextmanager
    def open(cls, port):
        url = f"ws://127.0.0.1:{port}/_stcore/stream"
        with connect(url, subprotocols=["streamlit"], max_size=None) as socket:
            yield cls(port, socket)

    def upload_addresses(self, n):
        """Where the server says that so many files may be sent."""
        message = BackMsg()
        message.file_urls_request.request_id = "1"
        message.file_urls_request.file_names.extend(f"{i}.csv" for i in range(n))
        message.file_urls_request.session_id = self.session_id
        self._socket.send(message.SerializeToString())
        answer = self._until("file_urls_response").file_urls_response
        return [urls.upload_url for urls in answer.file_urls]

    def upload(self, address, content):
        """The status that the server answers to a file. Its connection may end before."""
        with urllib.request.urlopen(f"http://{self._place}/_stcore/health") as health:
            cookie = health.headers["set-cookie"].split(";")[0]
        headers = {"Cookie": cookie, "X-Xsrftoken": cookie.split("=", 1)[1]}
        headers["Content-Type"] = "multipart/form-data; boundary=end"
        body = b'--end\r\nContent-Disposition: form-data; name="f"; filename="f.csv"\r\n\r\n'
        body += content + b"\r\n--end--\r\n"
        with closing(http.client.HTTPConnection(self._place, timeout=30)) as connection:
            with suppress(ConnectionError):  # what is refused is not read to its end
                connection.request("PUT", address, body, headers)
            with connection.getresponse() as answer:
                return answer.status

    def _until(self, kind):
        while True:
            message = ForwardMsg.FromString(self._socket.recv(timeout=30))
            if message.HasField(kind):
                return message


@contextmanager
def recording_proxy():
    """A proxy that answers nobody. Gives its address and the first lines that it was sent."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(300))

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
