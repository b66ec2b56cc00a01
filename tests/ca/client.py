"""A client of the CA made of stock gRPC for Python and the published proto alone; it shares no code with heddle.

The lab's tests start it to see that the API is what others understand. It compiles the proto itself, reads a request as a line
of JSON on stdin (token, identity, csr), and answers each with a line: the status code's name, its text, the chain.
Usage: client.py PROTO HOST:PORT ROOTS SERVER_NAME
"""

import json
import pathlib
import sys
import tempfile

import grpc
from grpc_tools import protoc


def compiled(proto):
    """The modules of the proto, made in a folder that is gone afterwards."""
    proto = pathlib.Path(proto)
    well_known = pathlib.Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        args = ["protoc", f"-I{proto.parent}", f"-I{well_known}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
        if protoc.main([*args, str(proto)]) != 0:
            sys.exit(f"protoc can't compile {proto}")
        sys.path.insert(0, folder)
        name = proto.stem
        return __import__(f"{name}_pb2"), __import__(f"{name}_pb2_grpc")


def main():
    proto, address, roots, server_name = sys.argv[1:]
    messages, services = compiled(proto)
    credentials = grpc.ssl_channel_credentials(pathlib.Path(roots).read_bytes())
    options = [("grpc.ssl_target_name_override", server_name)]
    with grpc.secure_channel(address, credentials, options) as channel:
        ca = services.IstioCertificateServiceStub(channel)
        print("ready", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            request = messages.IstioCertificateRequest(csr=asked["csr"], validity_duration=600)
            request.metadata.update({"ImpersonatedIdentity": asked["identity"]})
            metadata = [("authorization", f"Bearer {asked['token']}"), ("clusterid", "Kubernetes")]
            try:
                answer = ca.CreateCertificate(request, metadata=metadata, timeout=20)
                said = {"code": "OK", "text": "", "chain": list(answer.cert_chain)}
            except grpc.RpcError as error:
                said = {"code": error.code().name, "text": error.details(), "chain": []}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
