# Listens at port 8080 and accepts one connection, to which it says each line that it is told.
import socket
import sys

server = socket.create_server(("127.0.0.1", 8080))
connection = None
for line in iter(sys.stdin.readline, ""):
    if line.startswith("accept"):
        connection = server.accept()[0]
    elif line.startswith("close"):
        connection.close()
    elif connection:
        connection.sendall(line.encode())
    print("done", flush=True)
