// A lease's streams: made once for each state of a file, so that who asks waits for the transfer and not for the compressor.
package main

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

var (
	streamRate = flag.Int64("nfcrate", 0, "bytes a second of a lease's stream; 0: what the machine gives")
	streams    sync.Mutex
)

// streamOf answers a streamOptimized VMDK of a raw file as it is now.
func streamOf(raw string) (string, error) {
	st, err := os.Stat(raw)
	if err != nil {
		return "", err
	}
	state := sha256.Sum256([]byte(fmt.Sprintf("%s %d %d", raw, st.Size(), st.ModTime().UnixNano())))
	made := filepath.Join(workDir, fmt.Sprintf("stream-%x.vmdk", state[:8]))
	streams.Lock()
	defer streams.Unlock()
	if _, err := os.Stat(made); err == nil {
		return made, nil
	}
	out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, made+".part").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%v: %s", err, out)
	}
	return made, os.Rename(made+".part", made)
}

// sendStream: chunked, no Content-Length, no ranges, as ESXi does; the connection ends when the lease does.
func sendStream(w http.ResponseWriter, lease, raw string) {
	made, err := streamOf(raw)
	if err != nil {
		log.Print(err)
		http.Error(w, err.Error(), 500)
		return
	}
	f, err := os.Open(made)
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/x-vnd.vmware-streamVmdk")
	piece, began, sent := make([]byte, 256<<10), time.Now(), int64(0)
	for {
		n, err := f.Read(piece)
		if n == 0 || err != nil {
			return
		}
		if _, is := leases.Load(lease); !is {
			panic(http.ErrAbortHandler)
		}
		if _, err := w.Write(piece[:n]); err != nil {
			return
		}
		if sent += int64(n); *streamRate > 0 {
			time.Sleep(time.Until(began.Add(time.Duration(float64(sent) / float64(*streamRate) * float64(time.Second)))))
		}
	}
}
