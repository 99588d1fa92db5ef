// Goroutines that wait in channels, locks, conditions, timers, a connected unix socket and a
// command's pipe. Each request asks all of them; answers "COUNT TICKS ok" on port 8080.
package main

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// An echo over a unix socket, both ends held by goroutines here.
func unixEcho() io.ReadWriter {
	directory, err := os.MkdirTemp("/dev/shm", "go")
	must(err)
	listener, err := net.Listen("unix", filepath.Join(directory, "socket"))
	must(err)
	go func() {
		server, err := listener.Accept()
		must(err)
		_, _ = io.Copy(server, server)
	}()
	client, err := net.Dial("unix", listener.Addr().String())
	must(err)
	// A first line, so that the connection is accepted.
	fmt.Fprintln(client, "hello")
	_, err = bufio.NewReader(client).ReadString('\n')
	must(err)
	listener.Close()
	os.RemoveAll(directory)
	return client
}

type both struct {
	io.Reader
	io.Writer
}

// An echo by a command, whose end a goroutine waits for.
func commandEcho() io.ReadWriter {
	command := exec.Command("/bin/cat")
	in, err := command.StdinPipe()
	must(err)
	out, err := command.StdoutPipe()
	must(err)
	must(command.Start())
	go func() { _ = command.Wait() }()
	return both{out, in}
}

func main() {
	var count, ticks, woken int64
	go func() {
		for range time.Tick(10 * time.Millisecond) {
			atomic.AddInt64(&ticks, 1)
		}
	}()
	far := time.NewTimer(time.Hour)
	var lock sync.Mutex
	condition := sync.NewCond(&lock)
	for n := 0; n < 1000; n++ {
		go func() {
			for {
				lock.Lock()
				condition.Wait()
				lock.Unlock()
				atomic.AddInt64(&woken, 1)
			}
		}()
	}
	asked, answered := make(chan int64), make(chan int64)
	go func() {
		for number := range asked {
			answered <- 2 * number
		}
	}()
	echoes := map[string]io.ReadWriter{"the unix socket": unixEcho(), "the command": commandEcho()}
	readers := map[string]*bufio.Reader{}
	for name, echo := range echoes {
		readers[name] = bufio.NewReader(echo)
	}
	check := func() string {
		asked <- count
		if <-answered != 2*count {
			return "the channel"
		}
		for name, echo := range echoes {
			fmt.Fprintln(echo, count)
			if line, err := readers[name].ReadString('\n'); err != nil || line != fmt.Sprintln(count) {
				return fmt.Sprint(name, ": ", line, err)
			}
		}
		// All thousand wait by now, unless one was lost.
		condition.Broadcast()
		for begun := time.Now(); atomic.LoadInt64(&woken) != 1000*count; time.Sleep(time.Millisecond) {
			if time.Since(begun) > 5*time.Second {
				return fmt.Sprint("goroutines: ", atomic.LoadInt64(&woken), " woken")
			}
		}
		time.Sleep(10 * time.Millisecond)
		runtime.GC()
		select {
		case <-far.C:
			return "the timer"
		case <-time.After(5 * time.Millisecond):
		}
		return "ok"
	}
	var turn sync.Mutex
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		turn.Lock()
		defer turn.Unlock()
		count++
		verdict := check()
		fmt.Fprintf(w, "%d %d %s\n", count, atomic.LoadInt64(&ticks), verdict)
	})
	time.Sleep(20 * time.Millisecond)
	log.Fatal(http.ListenAndServe("127.0.0.1:8080", nil))
}
