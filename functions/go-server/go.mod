module trenv.dev/functions/go-server

go 1.19
