"""A small RTSP server: H.264 from FFmpeg's RTP muxer, sent over the RTSP connection."""

import socket
from fractions import Fraction
from socketserver import StreamRequestHandler

from tests.support.streams import SIZE, CameraServer

SDP = """v=0
o=- 0 0 IN IP4 127.0.0.1
s=camera
t=0 0
m=video 0 RTP/AVP 96
a=rtpmap:96 H264/90000
a=fmtp:96 packetization-mode=1
a=control:track0
""".replace("\n", "\r\n")
HEADERS = {
    "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
    "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n",
    "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
    "PLAY": "Session: 1\r\n",
}
ENCODER = {"preset": "ultrafast", "tune": "zerolatency", "x264-params": "repeat-headers=1:annexb=1"}


class _Handler(StreamRequestHandler):
    def handle(self):
        while request := self._request():
            method = request[0].split()[0]
            number = next(line for line in request if line.lower().startswith("cseq")).split(":")[1].strip()
            body = SDP if method == "DESCRIBE" else ""
            answer = f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n{HEADERS.get(method, '')}\r\n{body}"
            self.wfile.write(answer.encode())
            if method == "PLAY":
                self._play(self.server.camera)
                return

    def _request(self):
        lines = []
        while line := self.rfile.readline().strip():
            lines.append(line.decode())
        return lines

    def _play(self, camera):
        import av

        packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        packets.bind(("127.0.0.1", 0))
        packets.setblocking(False)
        address = f"rtp://127.0.0.1:{packets.getsockname()[1]}?pkt_size=1200"
        with packets, av.open(address, "w", format="rtp") as container:
            stream = container.add_stream("libx264", rate=25, options=ENCODER)
            stream.width, stream.height = SIZE[::-1]
            stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", 12
            for seconds, pixels in camera.frames():
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
                container.mux(stream.encode(frame))
                try:
                    while True:
                        packet = packets.recv(65536)
                        self.wfile.write(b"$\0" + len(packet).to_bytes(2, "big") + packet)
                except BlockingIOError:  # all sent
                    pass
                except OSError:  # the client is gone
                    return


class RtspServer(CameraServer):
    """Serve /live."""

    scheme, handler = "rtsp", _Handler
