// A function that is its own HTTP server: it listens on port 8080, without a watchdog.
package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"runtime/debug"
	"sync/atomic"
)

var (
	heap    = make([]byte, 4<<20)
	initID  string
	counter int64
)

func digest() string {
	sum := sha256.Sum256(heap)
	return hex.EncodeToString(sum[:8])
}

func main() {
	if _, err := rand.Read(heap); err != nil {
		log.Fatal(err)
	}
	initID = digest()
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		reply := map[string]interface{}{
			"message": "Hello from Go!",
			"counter": atomic.AddInt64(&counter, 1),
			"init_id": initID,
		}
		if r.URL.Query().Get("churn") != "" {
			// Takes memory, drops it, and gives it back to the kernel.
			for round := 0; round < 4; round++ {
				garbage := make([]byte, 16<<20)
				for at := range garbage {
					garbage[at] = byte(at)
				}
			}
			debug.FreeOSMemory()
		}
		if r.URL.Query().Get("check") != "" {
			reply["intact"] = digest() == initID
		}
		if err := json.NewEncoder(w).Encode(reply); err != nil {
			log.Print(err)
		}
	})
	log.Fatal(http.ListenAndServe(":8080", nil))
}
