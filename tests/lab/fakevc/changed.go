package main

// Changed block tracking as real servers do it: off until a VM is told to track, a change id for each disk at each snapshot, ids of another
// sequence after a reset. And the locks: the disk of a running VM is given to nobody, unless a snapshot has frozen it.

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

var (
	pageOf   int64
	sequence sync.Map // "vm/disk" -> "52 fa ke", the sequence of its change ids
	numbers  sync.Map // "vm/disk" -> *int64, the last number
	resets   int64
	bytesOut int64 // of flat extents, as ranges
)

func tracks(ref types.ManagedObjectReference) bool {
	vm, ok := simulator.Map.Get(ref).(*simulator.VirtualMachine)
	return ok && vm.Config != nil && vm.Config.ChangeTrackingEnabled != nil && *vm.Config.ChangeTrackingEnabled
}

func changeID(vm types.ManagedObjectReference, disk int32) string {
	key := fmt.Sprintf("%s/%d", vm.Value, disk)
	name, _ := sequence.LoadOrStore(key, fmt.Sprintf("52 fa ke %s %d", vm.Value, disk))
	number, _ := numbers.LoadOrStore(key, new(int64))
	return fmt.Sprintf("%s/%d", name, atomic.AddInt64(number.(*int64), 1))
}

// resetTracking: what a server does to a VM's change ids after a crash of the host or a grown disk. ?vm=ID&how=reset|back|forget
func resetTracking(w http.ResponseWriter, r *http.Request) {
	prefix := r.URL.Query().Get("vm") + "/"
	n := atomic.AddInt64(&resets, 1)
	numbers.Range(func(key, number interface{}) bool {
		if strings.HasPrefix(key.(string), prefix) {
			switch r.URL.Query().Get("how") {
			case "reset":
				sequence.Store(key, fmt.Sprintf("52 re set %d %s", n, key))
			case "back":
				atomic.StoreInt64(number.(*int64), 0)
			}
		}
		return true
	})
	if r.URL.Query().Get("how") == "forget" {
		frozen.Range(func(key, _ interface{}) bool {
			if strings.HasPrefix(key.(string), "52 ") {
				frozen.Delete(key)
			}
			return true
		})
	}
}

// moved tells how many bytes of flat extents were given as ranges, and begins to count anew.
func moved(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, `{"bytes": %d}`, atomic.SwapInt64(&bytesOut, 0))
}

// diskOf is the VM whose flat extent a URL below /folder leads to, and the disk's key.
func diskOf(r *http.Request) (*simulator.VirtualMachine, int32) {
	path := object.DatastorePath{Datastore: r.URL.Query().Get("dsName"), Path: strings.TrimPrefix(r.URL.Path, "/folder/")}
	if !strings.HasSuffix(path.Path, "-flat.vmdk") {
		return nil, 0
	}
	for _, e := range simulator.Map.All("VirtualMachine") {
		vm := e.(*simulator.VirtualMachine)
		if vm.Config == nil { // orphaned
			continue
		}
		ds, bs := disks(vm.Config.Hardware.Device)
		for i := range ds {
			if flat(bs[i].FileName) == path.String() {
				return vm, ds[i].Key
			}
		}
	}
	return nil, 0
}

// locked: a running VM writes to its disk, and nobody else may open it.
func locked(r *http.Request) bool {
	vm, _ := diskOf(r)
	return vm != nil && vm.Runtime.PowerState == types.VirtualMachinePowerStatePoweredOn && vm.Snapshot == nil
}

// frozenFile is what a VM's extent was when its current snapshot was taken: what is written since goes elsewhere.
func frozenFile(r *http.Request) string {
	vm, key := diskOf(r)
	if vm == nil {
		return ""
	}
	if vm.Snapshot == nil || vm.Snapshot.CurrentSnapshot == nil {
		return ""
	}
	if name, ok := frozen.Load(fmt.Sprintf("%s/%d", vm.Snapshot.CurrentSnapshot.Value, key)); ok {
		return name.(string)
	}
	return ""
}

type counting struct{ http.ResponseWriter }

func (c counting) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	atomic.AddInt64(&bytesOut, int64(n))
	return n, err
}

func served(w http.ResponseWriter, r *http.Request, name string) {
	f, err := os.Open(name)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	http.ServeContent(counting{w}, r, "", st.ModTime(), io.ReadSeeker(f))
}
