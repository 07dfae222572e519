// fakevc: a small vSphere test double: what the harness starts as a vCenter or an ESXi host (tests/harness/double.rs).  Imports Debian's
// golang-github-vmware-govmomi-dev (0.24.2) as a library.  It runs govmomi's
// simulator and adds what 0.24.2 lacks for VM export: VirtualMachine.ExportVm,
// VirtualMachineSnapshot.ExportSnapshot, HttpNfcLease download of streamOptimized
// VMDKs and VirtualMachine.QueryChangedDiskAreas (by diffing frozen flat extents).
//
// Trick: simulator objects cannot be wrapped safely (it casts to *VirtualMachine in
// many places), so the SOAP body's _this type is rewritten for the added methods and
// the simulator then dispatches them to the "FakeExport" object below, doing all the
// decoding, session checks and encoding itself.  http.ServeMux prefers host-specific
// patterns, so "127.0.0.1/sdk" comes before the simulator's own "/sdk".
package main

import (
	"bytes"
	"crypto/tls"
	"flag"
	"fmt"
	"io/ioutil"
	"log"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	_ "github.com/vmware/govmomi/lookup/simulator"
	_ "github.com/vmware/govmomi/pbm/simulator"
	_ "github.com/vmware/govmomi/sts/simulator"
	_ "github.com/vmware/govmomi/vapi/simulator"
)

var (
	workDir string
	leases  sync.Map // lease id -> *HttpNfcLease
	frozen  sync.Map // "snapshot id/device key" -> frozen flat file; "changeId" -> frozen flat file
	leaseTime time.Duration // without a word of progress
)

type HttpNfcLease struct {
	mo.HttpNfcLease
	files map[string]string // url name -> vmdk descriptor or raw file
	timer *time.Timer       // a lease whose holder says nothing ends, as at real servers
}

func (l *HttpNfcLease) end() {
	l.timer.Stop()
	leases.Delete(l.Self.Value)
	simulator.Map.Remove(l.Self)
}

func (l *HttpNfcLease) HttpNfcLeaseComplete(ctx *simulator.Context, r *types.HttpNfcLeaseComplete) soap.HasFault {
	l.end()
	return &methods.HttpNfcLeaseCompleteBody{Res: new(types.HttpNfcLeaseCompleteResponse)}
}
func (l *HttpNfcLease) HttpNfcLeaseAbort(ctx *simulator.Context, r *types.HttpNfcLeaseAbort) soap.HasFault {
	l.end()
	return &methods.HttpNfcLeaseAbortBody{Res: new(types.HttpNfcLeaseAbortResponse)}
}
func (l *HttpNfcLease) HttpNfcLeaseProgress(ctx *simulator.Context, r *types.HttpNfcLeaseProgress) soap.HasFault {
	l.TransferProgress = r.Percent
	l.timer.Reset(leaseTime)
	return &methods.HttpNfcLeaseProgressBody{Res: new(types.HttpNfcLeaseProgressResponse)}
}

// fakeExport receives the methods that 0.24.2's VirtualMachine / Snapshot lack.
type fakeExport struct{ self types.ManagedObjectReference }

func (f *fakeExport) Reference() types.ManagedObjectReference { return f.self }

func resolve(p string) string {
	var d object.DatastorePath
	d.FromString(p)
	found := ""
	for _, e := range simulator.Map.All("Datastore") {
		ds := e.(*simulator.Datastore)
		if ds.Name == d.Datastore {
			found = filepath.Join(ds.Info.GetDatastoreInfo().Url, d.Path)
			if _, err := os.Stat(filepath.Dir(found)); err == nil { // datacenters may have datastores of one name
				break
			}
		}
	}
	return found
}

func disks(dev []types.BaseVirtualDevice) (out []*types.VirtualDisk, back []*types.VirtualDiskFlatVer2BackingInfo) {
	for _, d := range dev {
		if vd, ok := d.(*types.VirtualDisk); ok {
			if b, ok := vd.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
				out, back = append(out, vd), append(back, b)
			}
		}
	}
	return
}

func flat(vmdk string) string { return strings.TrimSuffix(vmdk, ".vmdk") + "-flat.vmdk" }

func newLease(entity types.ManagedObjectReference, dev []types.BaseVirtualDevice, pick func(key int32, desc string) string) *HttpNfcLease {
	l := &HttpNfcLease{files: map[string]string{}}
	l.State = types.HttpNfcLeaseStateReady
	simulator.Map.Put(l)
	info := &types.HttpNfcLeaseInfo{Lease: l.Self, Entity: entity, LeaseTimeout: int32(leaseTime.Seconds())}
	ds, bs := disks(dev)
	for i, d := range ds {
		name := fmt.Sprintf("disk-%d.vmdk", i)
		desc := resolve(bs[i].FileName)
		l.files[name] = pick(d.Key, desc)
		info.TotalDiskCapacityInKB += d.CapacityInKB
		info.DeviceUrl = append(info.DeviceUrl, types.HttpNfcLeaseDeviceUrl{
			Key:       leaseKey(entity, dev, d),
			ImportKey: "", Url: "https://*/fakenfc/" + l.Self.Value + "/" + name,
			SslThumbprint: "", Disk: types.NewBool(true), TargetId: name, FileSize: 0,
		})
	}
	info.DeviceUrl = shuffled(entity, info.DeviceUrl)
	l.Info = info
	l.timer = time.AfterFunc(leaseTime, l.end)
	leases.Store(l.Self.Value, l)
	return l
}

func (f *fakeExport) ExportVm(ctx *simulator.Context, r *types.ExportVm) soap.HasFault {
	vm := simulator.Map.Get(types.ManagedObjectReference{Type: "VirtualMachine", Value: r.This.Value}).(*simulator.VirtualMachine)
	if vm.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff {
		return &methods.ExportVmBody{Fault_: simulator.Fault("", &types.InvalidPowerState{
			RequestedState: types.VirtualMachinePowerStatePoweredOff, ExistingState: vm.Runtime.PowerState})}
	}
	if exporting(vm.Self) {
		return &methods.ExportVmBody{Fault_: simulator.Fault("", &types.TaskInProgress{})}
	}
	l := newLease(vm.Self, vm.Config.Hardware.Device, func(_ int32, d string) string { return flat(d) })
	return &methods.ExportVmBody{Res: &types.ExportVmResponse{Returnval: l.Self}}
}

func (f *fakeExport) ExportSnapshot(ctx *simulator.Context, r *types.ExportSnapshot) soap.HasFault {
	s := simulator.Map.Get(types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: r.This.Value}).(*simulator.VirtualMachineSnapshot)
	l := newLease(s.Vm, s.Config.Hardware.Device, func(k int32, d string) string {
		p, _ := frozen.Load(fmt.Sprintf("%s/%d", s.Self.Value, k))
		return p.(string)
	})
	return &methods.ExportSnapshotBody{Res: &types.ExportSnapshotResponse{Returnval: l.Self}}
}

func (f *fakeExport) QueryChangedDiskAreas(ctx *simulator.Context, r *types.QueryChangedDiskAreas) soap.HasFault {
	body := new(methods.QueryChangedDiskAreasBody)
	if !tracks(types.ManagedObjectReference{Type: "VirtualMachine", Value: r.This.Value}) {
		body.Fault_ = simulator.Fault("change tracking is off", &types.FileFault{})
		return body
	}
	cur, ok := frozen.Load(fmt.Sprintf("%s/%d", r.Snapshot.Value, r.DeviceKey))
	if !ok {
		body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "deviceKey"})
		return body
	}
	old := ""
	if r.ChangeId != "*" {
		o, ok := frozen.Load(r.ChangeId)
		if !ok {
			body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "changeId"})
			return body
		}
		old = o.(string)
	}
	info, err := diff(old, cur.(string), r.StartOffset, pageOf)
	if err != nil {
		body.Fault_ = simulator.Fault(err.Error(), &types.FileFault{File: cur.(string)})
		return body
	}
	body.Res = &types.QueryChangedDiskAreasResponse{Returnval: *info}
	return body
}

// diff lists the 64 KiB blocks of b that differ from a (or from zeroes when a is "").
// At most page bytes of the disk are told of in one answer, as real servers do; the caller asks on from there.
func diff(a, b string, start, page int64) (*types.DiskChangeInfo, error) {
	const bs = 64 << 10
	fb, err := os.Open(b)
	if err != nil {
		return nil, err
	}
	defer fb.Close()
	st, _ := fb.Stat()
	var fa *os.File
	if a != "" {
		if fa, err = os.Open(a); err != nil {
			return nil, err
		}
		defer fa.Close()
	}
	end := st.Size()
	if page > 0 && start+page < end {
		end = (start + page) / bs * bs
	}
	out := &types.DiskChangeInfo{StartOffset: start, Length: end - start}
	x, y := make([]byte, bs), make([]byte, bs)
	for off := start / bs * bs; off < end; off += bs {
		n, _ := fb.ReadAt(y, off)
		for i := range x {
			x[i] = 0
		}
		if fa != nil {
			fa.ReadAt(x, off)
		}
		if bytes.Equal(x[:n], y[:n]) {
			continue
		}
		if k := len(out.ChangedArea); k > 0 && out.ChangedArea[k-1].Start+out.ChangedArea[k-1].Length == off {
			out.ChangedArea[k-1].Length += int64(n)
		} else {
			out.ChangedArea = append(out.ChangedArea, types.DiskChangeExtent{Start: off, Length: int64(n)})
		}
	}
	return out, nil
}

// describe writes an ESXi-style descriptor for the flat extent beside it.
func describe(desc string, size int64) error {
	text := fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\nRW %d VMFS \"%s\"\n\nddb.adapterType = \"lsilogic\"\nddb.virtualHWVersion = \"13\"\n",
		size/512, filepath.Base(flat(desc)))
	return ioutil.WriteFile(desc, []byte(text), 0600)
}

// sizeDisks gives every disk that the simulator left empty its declared capacity, as a hole.
func sizeDisks() error {
	for _, e := range simulator.Map.All("VirtualMachine") {
		ds, bs := disks(e.(*simulator.VirtualMachine).Config.Hardware.Device)
		for i, d := range ds {
			desc := resolve(bs[i].FileName)
			if st, err := os.Stat(flat(desc)); err != nil || st.Size() > 0 {
				continue
			}
			size := d.CapacityInKB * 1024
			if err := os.Truncate(flat(desc), size); err != nil {
				return err
			}
			if err := describe(desc, size); err != nil {
				return err
			}
		}
	}
	return nil
}

// seedDisk makes raw the flat extent of the VM's first disk and writes an ESXi-style descriptor.
func seedDisk(vmName, raw string) error {
	for _, e := range simulator.Map.All("VirtualMachine") {
		if e.Entity().Name != vmName {
			continue
		}
		vm := e.(*simulator.VirtualMachine)
		ds, bs := disks(vm.Config.Hardware.Device)
		desc := resolve(bs[0].FileName)
		if out, err := exec.Command("cp", "--sparse=always", raw, flat(desc)).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %s", err, out)
		}
		st, err := os.Stat(flat(desc))
		if err != nil {
			return err
		}
		ds[0].CapacityInKB, ds[0].CapacityInBytes = st.Size()/1024, st.Size()
		return describe(desc, st.Size())
	}
	return fmt.Errorf("no VM %s", vmName)
}

// watcher freezes the flat extents of a VM whenever a snapshot object appears.
type watcher struct{}

func (watcher) Reference() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "FakeWatcher", Value: "w"}
}
func (watcher) PutObject(o mo.Reference) {
	s, ok := o.(*simulator.VirtualMachineSnapshot)
	if !ok {
		return
	}
	ds, bs := disks(s.Config.Hardware.Device)
	dev := append([]types.BaseVirtualDevice{}, s.Config.Hardware.Device...)
	for i, d := range ds {
		dst := filepath.Join(workDir, fmt.Sprintf("%s-%d.raw", s.Self.Value, d.Key))
		if out, err := exec.Command("cp", "--sparse=always", flat(resolve(bs[i].FileName)), dst).CombinedOutput(); err != nil {
			log.Printf("freeze: %v %s", err, out)
		}
		frozen.Store(fmt.Sprintf("%s/%d", s.Self.Value, d.Key), dst)
		nd, nb := *d, *bs[i]
		if tracks(s.Vm) {
			nb.ChangeId = changeID(s.Vm, d.Key)
			frozen.Store(nb.ChangeId, dst)
		}
		nd.Backing = &nb
		for j := range dev {
			if dev[j].GetVirtualDevice().Key == d.Key {
				dev[j] = &nd
			}
		}
	}
	s.Config.Hardware.Device = dev
}
func (watcher) UpdateObject(mo.Reference, []types.PropertyChange) {}
func (watcher) RemoveObject(types.ManagedObjectReference)         {}

func count(tree []types.VirtualMachineSnapshotTree) int {
	n := len(tree)
	for _, s := range tree {
		n += count(s.ChildSnapshotList)
	}
	return n
}

var this = regexp.MustCompile(`(<(?:[A-Za-z0-9]+:)?_this\b[^>]*?\btype=")(VirtualMachine|VirtualMachineSnapshot)(")`)
var added = regexp.MustCompile(`<(?:[A-Za-z0-9]+:)?(ExportVm|ExportSnapshot|QueryChangedDiskAreas)\b`)
var thisID = regexp.MustCompile(`_this\b[^>]*>([^<]+)<`)

func main() {
	listen := flag.String("l", "127.0.0.1:8989", "listen")
	esx := flag.Bool("esx", false, "simulate ESXi")
	user := flag.String("u", "", "user")
	pass := flag.String("p", "", "password")
	cert := flag.String("cert", "", "TLS certificate")
	key := flag.String("key", "", "TLS key")
	seed := flag.String("seed", "", "VM=raw-image[,VM=raw-image...]: make the image the VM's first disk")
	flag.DurationVar(&leaseTime, "lease", 300*time.Second, "a lease ends after this time without progress")
	machines := flag.Int("vms", 0, "VMs of each host and resource pool")
	off := flag.String("off", "", "VM[,VM...]: these are powered off at the start")
	flag.Int64Var(&pageOf, "areas", 0, "bytes of a disk that one answer of QueryChangedDiskAreas covers; 0: all")
	auth := flag.Bool("folderauth", true, "demand Basic auth or a session cookie on /folder, as real servers do")
	flag.IntVar(&pageMost, "page", 0, "objects of a page at most; 0: as many as are asked for")
	scene := flag.Bool("scenery", false, "a second datacenter, odd names, odd VMs")
	flag.Parse()
	workDir, _ = ioutil.TempDir("", "fakevc")
	defer os.RemoveAll(workDir)

	model := simulator.VPX()
	if *esx {
		model = simulator.ESX()
	}
	if *machines > 0 {
		model.Machine = *machines
	}
	if *scene {
		model.Machine = 8
		if !*esx {
			model.Datacenter, model.Folder = 2, 1
		}
	}
	if err := model.Create(); err != nil {
		log.Fatal(err)
	}
	defer model.Remove()
	simulator.Map.AddHandler(watcher{})
	for _, e := range simulator.Map.All("Datastore") {
		fmt.Printf("datastore %s %s\n", e.Entity().Name, e.(*simulator.Datastore).Info.GetDatastoreInfo().Url)
	}
	for _, kv := range strings.Split(*seed, ",") {
		if p := strings.SplitN(kv, "=", 2); len(p) == 2 {
			if err := seedDisk(p[0], p[1]); err != nil {
				log.Fatal(err)
			}
		}
	}

	if err := sizeDisks(); err != nil {
		log.Fatal(err)
	}
	for _, e := range simulator.Map.All("VirtualMachine") {
		for _, name := range strings.Split(*off, ",") {
			if vm := e.(*simulator.VirtualMachine); vm.Name == name {
				vm.Runtime.PowerState = types.VirtualMachinePowerStatePoweredOff
				vm.Summary.Runtime.PowerState = types.VirtualMachinePowerStatePoweredOff
			}
		}
	}

	if *scene {
		scenery(*esx)
	}
	putInventoryObjects()

	s := model.Service
	s.RegisterEndpoints = true
	s.Listen = &url.URL{Host: *listen}
	if *user != "" {
		s.Listen.User = url.UserPassword(*user, *pass)
	}
	s.TLS = new(tls.Config)
	if *cert != "" {
		c, err := tls.LoadX509KeyPair(*cert, *key)
		if err != nil {
			log.Fatal(err)
		}
		s.TLS.Certificates = []tls.Certificate{c}
	}
	mux := http.NewServeMux()
	s.ServeMux = mux
	sdk := func(w http.ResponseWriter, r *http.Request) {
		b, _ := ioutil.ReadAll(r.Body)
		b = calmed(b)
		if added.Match(b) || slowed(b) {
			if m := thisID.FindSubmatch(b); m != nil {
				ref := types.ManagedObjectReference{Type: "FakeExport", Value: string(m[1])}
				if simulator.Map.Get(ref) == nil {
					simulator.Map.Put(&fakeExport{ref})
				}
				b = this.ReplaceAll(b, []byte("${1}FakeExport${3}"))
			}
		}
		b = inventoryCalls(b)
		r.Body = ioutil.NopCloser(bytes.NewReader(b))
		r.ContentLength = int64(len(b))
		s.ServeSDK(w, r)
	}
	folder := func(w http.ResponseWriter, r *http.Request) {
		u, pw, basic := r.BasicAuth()
		if *user != "" {
			basic = basic && u == *user && pw == *pass
		}
		_, err := r.Cookie("vmware_soap_session") // presence only; the simulator keeps the session list private
		if *auth && !basic && err != nil {
			w.Header().Set("WWW-Authenticate", `Basic realm="VMware HTTP server"`)
			http.Error(w, "", http.StatusUnauthorized)
			return
		}
		if locked(r) {
			http.Error(w, "file is locked", http.StatusInternalServerError)
			return
		}
		if r.Method == http.MethodGet || r.Method == http.MethodHead {
			if name := frozenFile(r); name != "" {
				w.Header().Set("Content-Type", "application/octet-stream")
				served(w, r, name)
				return
			}
			w.Header().Set("Content-Type", "application/octet-stream") // as ESXi; Proxmox's importer insists on it
		}
		serveFile(w, r)
	}
	nfc := func(w http.ResponseWriter, r *http.Request) {
		p := strings.Split(strings.TrimPrefix(r.URL.Path, "/fakenfc/"), "/")
		v, ok := leases.Load(p[0])
		if !ok || len(p) != 2 || v.(*HttpNfcLease).files[p[1]] == "" {
			http.NotFound(w, r)
			return
		}
		sendStream(w, p[0], v.(*HttpNfcLease).files[p[1]])
	}
	left := func(w http.ResponseWriter, r *http.Request) {
		n := 0
		leases.Range(func(_, _ interface{}) bool { n++; return true })
		snapshots, tracking := 0, 0
		for _, e := range simulator.Map.All("VirtualMachine") {
			if s := e.(*simulator.VirtualMachine).Snapshot; s != nil {
				snapshots += count(s.RootSnapshotList)
			}
			if tracks(e.Reference()) {
				tracking++
			}
		}
		fmt.Fprintf(w, `{"leases": %d, "snapshots": %d, "tracking": %d}`, n, snapshots, tracking)
	}
	for _, h := range []string{"127.0.0.1", "localhost"} {
		mux.HandleFunc(h+"/left", left)
		mux.HandleFunc(h+"/moved", moved)
		mux.HandleFunc(h+"/reset", resetTracking)
		mux.HandleFunc(h+"/expire", expire)
		mux.HandleFunc(h+"/tasktime", setTaskTime)
		mux.HandleFunc(h+"/tools", setTools)
		mux.HandleFunc(h+"/inventory", serveInventory)
		mux.HandleFunc(h+"/sdk", sdk)
		mux.HandleFunc(h+"/folder/", folder)
		mux.HandleFunc(h+"/fakenfc/", nfc)
	}
	srv := s.NewServer()
	fmt.Printf("listening %s pid %d\n", srv.URL, os.Getpid())
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
	<-sig
}
