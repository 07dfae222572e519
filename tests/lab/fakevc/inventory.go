// What real servers do about inventories that govmomi's simulator does not: pages, device keys of leases by controller, /folder by the
// datacenter's whole path, privileges that an account lacks; and a scenery of odd names and odd VMs (-scenery).
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"math/rand"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// ---- device keys of leases

// leaseKey is "/vm-57/ParaVirtualSCSIController0:1": the controller's type, its bus and the disk's unit.
func leaseKey(entity types.ManagedObjectReference, dev []types.BaseVirtualDevice, d *types.VirtualDisk) string {
	for _, c := range dev {
		if b, ok := c.(types.BaseVirtualController); ok && c.GetVirtualDevice().Key == d.ControllerKey {
			unit := int32(0)
			if d.UnitNumber != nil {
				unit = *d.UnitNumber
			}
			return fmt.Sprintf("/%s/%s%d:%d", entity.Value, reflect.TypeOf(c).Elem().Name(), b.GetVirtualController().BusNumber, unit)
		}
	}
	return fmt.Sprintf("/%s/VirtualDisk:%d", entity.Value, d.Key)
}

// shuffled gives the devices of a lease in another order than the VM has them, and one that is no disk.
func shuffled(entity types.ManagedObjectReference, urls []types.HttpNfcLeaseDeviceUrl) []types.HttpNfcLeaseDeviceUrl {
	nvram := types.HttpNfcLeaseDeviceUrl{
		Key: "/" + entity.Value + "/nvram", Url: "https://*/fakenfc/none/nvram", Disk: types.NewBool(false), TargetId: "nvram",
	}
	out := []types.HttpNfcLeaseDeviceUrl{nvram}
	for i := len(urls) - 1; i >= 0; i-- {
		out = append(out, urls[i])
	}
	return out
}

// ---- pages and privileges

var (
	pageMost  int      // objects of a page at most, whatever is asked for; 0: what is asked for
	lacking   sync.Map // privilege -> true
	noAnswer  bool     // the server cannot say what an account may
	pagesLock sync.Mutex
	pages     = map[string]*pageRest{} // token -> what is left
	pageN     int
	pagesSeen int
)

type pageRest struct {
	session string
	objects []types.ObjectContent
	most    int
}

var collectorCall = regexp.MustCompile(`<(?:[A-Za-z0-9]+:)?(RetrievePropertiesEx|ContinueRetrievePropertiesEx)\b`)
var collectorThis = regexp.MustCompile(`(<(?:[A-Za-z0-9]+:)?_this\b[^>]*?\btype=")(PropertyCollector)(")`)
var privilegeCall = regexp.MustCompile(`<(?:[A-Za-z0-9]+:)?HasPrivilegeOnEntities\b`)
var privilegeThis = regexp.MustCompile(`(<(?:[A-Za-z0-9]+:)?_this\b[^>]*?\btype=")(AuthorizationManager)(")`)

// inventoryCalls sends calls that are served here to the objects below.
func inventoryCalls(b []byte) []byte {
	if collectorCall.Match(b) {
		return collectorThis.ReplaceAll(b, []byte("${1}FakeCollector${3}"))
	}
	if privilegeCall.Match(b) {
		return privilegeThis.ReplaceAll(b, []byte("${1}FakeAuthorization${3}"))
	}
	return b
}

func putInventoryObjects() {
	for _, id := range []string{"propertyCollector", "ha-property-collector"} {
		simulator.Map.Put(&fakeCollector{types.ManagedObjectReference{Type: "FakeCollector", Value: id}})
	}
	for _, id := range []string{"AuthorizationManager", "ha-authmgr"} {
		simulator.Map.Put(&fakeAuthorization{types.ManagedObjectReference{Type: "FakeAuthorization", Value: id}})
	}
}

type fakeCollector struct{ self types.ManagedObjectReference }

func (c *fakeCollector) Reference() types.ManagedObjectReference { return c.self }

func sessionOf(ctx *simulator.Context) string {
	if ctx.Session == nil {
		return ""
	}
	return ctx.Session.Key
}

func (c *fakeCollector) page(session string, objects []types.ObjectContent, most int) types.RetrieveResult {
	pagesLock.Lock()
	defer pagesLock.Unlock()
	pagesSeen++
	if most <= 0 || len(objects) <= most {
		return types.RetrieveResult{Objects: objects}
	}
	pageN++
	token := fmt.Sprintf("%d-%s", pageN, "a&b<c>") // whoever hands it back has to quote it
	pages[token] = &pageRest{session, objects[most:], most}
	return types.RetrieveResult{Objects: objects[:most], Token: token}
}

func (c *fakeCollector) RetrievePropertiesEx(ctx *simulator.Context, r *types.RetrievePropertiesEx) soap.HasFault {
	real := simulator.NewPropertyCollector(types.ManagedObjectReference{Type: "PropertyCollector", Value: c.self.Value})
	res := real.(*simulator.PropertyCollector).RetrievePropertiesEx(ctx, r)
	body, ok := res.(*methods.RetrievePropertiesExBody)
	if !ok || body.Res == nil || body.Res.Returnval == nil {
		return res
	}
	most := int(r.Options.MaxObjects)
	if pageMost > 0 && (most == 0 || most > pageMost) {
		most = pageMost
	}
	if len(body.Res.Returnval.Objects) == 0 {
		body.Res.Returnval = nil // nothing found: no value at all
		return body
	}
	page := c.page(sessionOf(ctx), body.Res.Returnval.Objects, most)
	body.Res.Returnval = &page
	return body
}

func (c *fakeCollector) ContinueRetrievePropertiesEx(ctx *simulator.Context, r *types.ContinueRetrievePropertiesEx) soap.HasFault {
	body := new(methods.ContinueRetrievePropertiesExBody)
	pagesLock.Lock()
	rest := pages[r.Token]
	delete(pages, r.Token) // good once
	pagesLock.Unlock()
	if rest == nil || rest.session != sessionOf(ctx) {
		body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "token"})
		return body
	}
	body.Res = &types.ContinueRetrievePropertiesExResponse{Returnval: c.page(rest.session, rest.objects, rest.most)}
	return body
}

type fakeAuthorization struct{ self types.ManagedObjectReference }

func (a *fakeAuthorization) Reference() types.ManagedObjectReference { return a.self }

func (a *fakeAuthorization) HasPrivilegeOnEntities(ctx *simulator.Context, r *types.HasPrivilegeOnEntities) soap.HasFault {
	body := new(methods.HasPrivilegeOnEntitiesBody)
	if noAnswer {
		body.Fault_ = simulator.Fault("", new(types.NotSupported))
		return body
	}
	if r.SessionId != sessionOf(ctx) {
		body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "sessionId"})
		return body
	}
	res := new(types.HasPrivilegeOnEntitiesResponse)
	for _, e := range r.Entity {
		if simulator.Map.Get(e) == nil {
			body.Fault_ = simulator.Fault("", &types.ManagedObjectNotFound{Obj: e})
			return body
		}
		p := types.EntityPrivilege{Entity: e}
		for _, id := range r.PrivId {
			_, lacks := lacking.Load(id)
			p.PrivAvailability = append(p.PrivAvailability, types.PrivilegeAvailability{PrivId: id, IsGranted: !lacks})
		}
		res.Returnval = append(res.Returnval, p)
	}
	body.Res = res
	return body
}

// serveInventory: GET /inventory tells figures; ?lacks=A,B takes privileges away from the account, ?silent=true makes the server unable to say.
func serveInventory(w http.ResponseWriter, r *http.Request) {
	if q := r.URL.Query(); len(q) > 0 {
		lacking.Range(func(k, _ interface{}) bool { lacking.Delete(k); return true })
		for _, id := range strings.Split(q.Get("lacks"), ",") {
			lacking.Store(id, true)
		}
		noAnswer = q.Get("silent") == "true"
	}
	pagesLock.Lock()
	defer pagesLock.Unlock()
	json.NewEncoder(w).Encode(map[string]int{"pages": pagesSeen, "vms": len(simulator.Map.All("VirtualMachine"))})
}

// ---- /folder

// placeOf is the path of a datacenter below the root, as the inventory spells it.
func placeOf(e mo.Entity) string {
	var names []string
	for p := e.Entity(); p.Parent != nil; p = simulator.Map.Get(*p.Parent).(mo.Entity).Entity() {
		names = append([]string{p.Name}, names...)
	}
	return strings.Join(names, "/")
}

// serveFile serves ranges of a datastore's file: the datacenter by its whole path, the datastore by its name within that.
func serveFile(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	for _, e := range simulator.Map.All("Datacenter") {
		dc := e.(*simulator.Datacenter)
		place := placeOf(dc)
		if place != q.Get("dcPath") && !(dc.Parent == nil && dc.Name == q.Get("dcPath")) {
			continue
		}
		for _, ref := range dc.Datastore {
			ds, ok := simulator.Map.Get(ref).(*simulator.Datastore)
			if !ok || ds.Name != q.Get("dsName") {
				continue
			}
			f, err := os.Open(filepath.Join(ds.Info.GetDatastoreInfo().Url, strings.TrimPrefix(r.URL.Path, "/folder/")))
			if err != nil {
				http.NotFound(w, r)
				return
			}
			defer f.Close()
			st, _ := f.Stat()
			http.ServeContent(w, r, "", st.ModTime(), f)
			return
		}
	}
	log.Printf("no datastore for %s", r.URL.RawQuery)
	http.NotFound(w, r)
}

// ---- the scenery

func vmNamed(name string) *simulator.VirtualMachine {
	for _, e := range simulator.Map.All("VirtualMachine") {
		if vm := e.(*simulator.VirtualMachine); vm.Name == name {
			return vm
		}
	}
	log.Fatalf("no VM %s for the scenery", name)
	return nil
}

func rename(vm *simulator.VirtualMachine, name string) *simulator.VirtualMachine {
	vm.Name, vm.Summary.Config.Name = name, name
	if vm.Config != nil {
		vm.Config.Name = name
	}
	return vm
}

func power(vm *simulator.VirtualMachine, state types.VirtualMachinePowerState) *simulator.VirtualMachine {
	vm.Runtime.PowerState, vm.Summary.Runtime.PowerState = state, state
	return vm
}

func powerOff(vm *simulator.VirtualMachine) *simulator.VirtualMachine {
	return power(vm, types.VirtualMachinePowerStatePoweredOff)
}

func move(e mo.Entity, to *simulator.Folder) {
	from := simulator.Map.Get(*e.Entity().Parent).(*simulator.Folder)
	kept := from.ChildEntity[:0]
	for _, ref := range from.ChildEntity {
		if ref != e.Reference() {
			kept = append(kept, ref)
		}
	}
	from.ChildEntity = kept
	to.ChildEntity = append(to.ChildEntity, e.Reference())
	e.Entity().Parent = &to.Self
}

func folderIn(parent *simulator.Folder, name string) *simulator.Folder {
	f := &simulator.Folder{}
	f.Name, f.ChildType = name, parent.ChildType
	parent.ChildEntity = append(parent.ChildEntity, simulator.Map.PutEntity(parent, f).Reference())
	return f
}

// fill makes a sparse flat file of that size with data in places that depend on the seed, and its descriptor.
func fill(desc string, size, seed int64) {
	f, err := os.Create(flat(desc))
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		log.Fatal(err)
	}
	r := rand.New(rand.NewSource(seed))
	data := make([]byte, 1<<20)
	for _, at := range []int64{0, 4<<20 + seed<<12, size - 1<<20} {
		r.Read(data)
		f.WriteAt(data, at)
	}
	if err := describe(desc, size); err != nil {
		log.Fatal(err)
	}
}

const diskSize = 16 << 20

// three gives a VM three disks of one size at three kinds of controllers; the order of their keys is not that of their seats.
func three(vm *simulator.VirtualMachine, seed int64) {
	ds, bs := disks(vm.Config.Hardware.Device)
	first := bs[0].FileName
	fill(resolve(first), diskSize, seed)
	ds[0].CapacityInKB, ds[0].CapacityInBytes = diskSize/1024, diskSize
	controllers := []types.BaseVirtualDevice{
		&types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{VirtualController: types.VirtualController{
			VirtualDevice: types.VirtualDevice{Key: 15000}, BusNumber: 0}}},
		&types.VirtualLsiLogicController{VirtualSCSIController: types.VirtualSCSIController{VirtualController: types.VirtualController{
			VirtualDevice: types.VirtualDevice{Key: 1002}, BusNumber: 2}, SharedBus: types.VirtualSCSISharingNoSharing}},
	}
	vm.Config.Hardware.Device = append(vm.Config.Hardware.Device, controllers...)
	for i, at := range []struct{ key, controller, unit int32 }{{16003, 15000, 3}, {2033, 1002, 1}} {
		name := strings.Replace(first, "disk1.vmdk", fmt.Sprintf("disk%d.vmdk", i+2), 1)
		fill(resolve(name), diskSize, seed+int64(i)+1)
		nd, nb := *ds[0], *bs[0]
		nb.FileName, nd.Backing = name, &nb
		nd.Key, nd.ControllerKey, nd.UnitNumber = at.key, at.controller, types.NewInt32(at.unit)
		nd.DeviceInfo = &types.Description{Label: fmt.Sprintf("Hard disk %d", i+2)}
		vm.Config.Hardware.Device = append(vm.Config.Hardware.Device, &nd)
	}
}

// replaceDisk hands a copy of the VM's first disk and its backing to be changed.
func replaceDisk(vm *simulator.VirtualMachine, change func(*types.VirtualDisk, *types.VirtualDiskFlatVer2BackingInfo)) {
	for i, d := range vm.Config.Hardware.Device {
		if vd, ok := d.(*types.VirtualDisk); ok {
			nd, nb := *vd, *vd.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
			nd.Backing = &nb
			change(&nd, &nb)
			vm.Config.Hardware.Device[i] = &nd
			return
		}
	}
}

func withoutDisks(dev []types.BaseVirtualDevice) (out []types.BaseVirtualDevice) {
	for _, d := range dev {
		if _, ok := d.(*types.VirtualDisk); !ok {
			out = append(out, d)
		}
	}
	return
}

// scenery makes what inventories are like after some years. Names are spelled as the inventory spells them: %2f, %25.
func scenery(esx bool) {
	if esx {
		rename(powerOff(vmNamed("ha-host_VM2")), "three off")
		rename(vmNamed("ha-host_VM3"), "three on")
	} else {
		elsewhere()
		rename(powerOff(vmNamed("DC1_H0_VM2")), "three off %2f 100%25 & <ü> 'a' \"b\"")
		rename(vmNamed("DC1_H0_VM3"), "three on %2f 100%25 & <ü> 'a' \"b\"")
	}
	for _, e := range simulator.Map.All("VirtualMachine") {
		vm := e.(*simulator.VirtualMachine)
		switch {
		case strings.HasPrefix(vm.Name, "three off"):
			three(vm, 10)
		case strings.HasPrefix(vm.Name, "three on"):
			three(vm, 20)
		}
	}
	if esx {
		return
	}
	dc0 := simulator.Map.Get(*vmNamed("DC0_H0_VM0").Parent).(*simulator.Folder)
	for i, name := range []string{"eins", "zwei"} {
		twin := vmNamed(fmt.Sprintf("DC0_H0_VM%d", i+2))
		move(twin, folderIn(dc0, name))
		fill(resolve(firstDisk(twin)), diskSize, 30+int64(i))
		replaceDisk(twin, func(d *types.VirtualDisk, _ *types.VirtualDiskFlatVer2BackingInfo) {
			d.CapacityInKB, d.CapacityInBytes = diskSize/1024, diskSize
		})
		rename(powerOff(twin), "twin")
	}
	golden := rename(powerOff(vmNamed("DC0_H0_VM4")), "golden")
	golden.Config.Template, golden.Summary.Config.Template, golden.ResourcePool = true, true, nil
	bare := rename(powerOff(vmNamed("DC0_H0_VM5")), "no disks")
	bare.Config.Hardware.Device = withoutDisks(bare.Config.Hardware.Device)
	lost := rename(powerOff(vmNamed("DC0_H0_VM6")), "lost")
	lost.Config, lost.Runtime.ConnectionState = nil, types.VirtualMachineConnectionStateOrphaned
	rename(powerOff(vmNamed("DC0_H0_VM7")), "soon gone")

	of := func(i int, name string) *simulator.VirtualMachine {
		return rename(powerOff(vmNamed(fmt.Sprintf("DC0_C0_RP0_VM%d", i))), name)
	}
	replaceDisk(of(0, "with an RDM"), func(d *types.VirtualDisk, b *types.VirtualDiskFlatVer2BackingInfo) {
		d.Backing = &types.VirtualDiskRawDiskMappingVer1BackingInfo{
			VirtualDeviceFileBackingInfo: b.VirtualDeviceFileBackingInfo, LunUuid: "02", DeviceName: "vml.02", CompatibilityMode: "physicalMode",
			DiskMode: "independent_persistent",
		}
	})
	replaceDisk(of(1, "shared"), func(_ *types.VirtualDisk, b *types.VirtualDiskFlatVer2BackingInfo) {
		b.Sharing = "sharingMultiWriter"
	})
	replaceDisk(power(of(2, "independent"), types.VirtualMachinePowerStatePoweredOn), func(_ *types.VirtualDisk, b *types.VirtualDiskFlatVer2BackingInfo) {
		b.DiskMode = string(types.VirtualDiskModeIndependent_persistent)
	})
	replaceDisk(of(3, "encrypted"), func(_ *types.VirtualDisk, b *types.VirtualDiskFlatVer2BackingInfo) {
		b.KeyId = &types.CryptoKeyId{KeyId: "k1", ProviderId: &types.KeyProviderId{Id: "kms"}}
	})
	odd := of(4, "with a passed-through card")
	odd.Config.Hardware.Device = append(odd.Config.Hardware.Device, &types.VirtualPCIPassthrough{VirtualDevice: types.VirtualDevice{
		Key: 13000, DeviceInfo: &types.Description{Label: "PCI device 0"}}})
	busy := of(5, "rich")
	busy.Config.Annotation, busy.Config.ChangeTrackingEnabled, busy.Config.Version = "kept by Änne & co", types.NewBool(true), "vmx-19"
	busy.Guest.HostName, busy.Guest.IpAddress = "rich.example", "192.0.2.7"
	busy.Guest.Net = []types.GuestNicInfo{{Network: "VM Network", IpAddress: []string{"192.0.2.7", "fe80::1"}, DeviceConfigId: 4000}}
	busy.Guest.ToolsRunningStatus, busy.Guest.ToolsVersion = "guestToolsRunning", "12352"
	huge := of(6, "huge")
	replaceDisk(huge, func(d *types.VirtualDisk, b *types.VirtualDiskFlatVer2BackingInfo) {
		d.CapacityInKB, d.CapacityInBytes, b.ThinProvisioned = 1<<40, 1<<50, types.NewBool(false)
	})
}

func firstDisk(vm *simulator.VirtualMachine) string {
	_, bs := disks(vm.Config.Hardware.Device)
	return bs[0].FileName
}

// elsewhere gives the second datacenter, its folders, its datastore and what lies there names that have to be quoted in paths, queries and XML.
func elsewhere() {
	const store = "Speicher ü & %25 <1>"
	dc := simulator.Map.Get(*simulator.Map.Get(*vmNamed("DC1_H0_VM2").Parent).(mo.Entity).Entity().Parent).(mo.Entity)
	for dc.Reference().Type != "Datacenter" {
		dc.Entity().Name = "Kunden %2f \"A & B\""
		dc = simulator.Map.Get(*dc.Entity().Parent).(mo.Entity)
	}
	vmFolder := simulator.Map.Get(dc.(*simulator.Datacenter).VmFolder).(*simulator.Folder)
	vmFolder.Name = "vm"
	for _, ref := range vmFolder.ChildEntity {
		if f, ok := simulator.Map.Get(ref).(*simulator.Folder); ok {
			f.Name = "Kunden %2f \"A & B\""
		}
	}
	dc.Entity().Name = "RZ %2f 50%25 ü"
	simulator.Map.Get(*dc.Entity().Parent).(mo.Entity).Entity().Name = "Büro & <Süd>"
	for _, ref := range dc.(*simulator.Datacenter).Datastore {
		ds := simulator.Map.Get(ref).(*simulator.Datastore)
		old := ds.Name
		ds.Name, ds.Info.GetDatastoreInfo().Name, ds.Summary.Name = store, store, store
		for _, e := range simulator.Map.All("VirtualMachine") {
			vm := e.(*simulator.VirtualMachine)
			if !strings.HasPrefix(vm.Name, "DC1_") {
				continue
			}
			folder := strings.Replace(vm.Name, "DC1_", "DC1 % & <ü> 'a' \"b\" #?+", 1)
			url := ds.Info.GetDatastoreInfo().Url
			if err := os.Rename(filepath.Join(url, vm.Name), filepath.Join(url, folder)); err != nil {
				log.Fatal(err)
			}
			files := &vm.Config.Files
			for _, p := range []*string{&files.VmPathName, &files.SnapshotDirectory, &files.SuspendDirectory, &files.LogDirectory, &vm.Summary.Config.VmPathName} {
				*p = strings.Replace(*p, "["+old+"] "+vm.Name, "["+store+"] "+folder, 1)
			}
			for i := range vm.LayoutEx.File {
				p := &vm.LayoutEx.File[i].Name
				*p = strings.Replace(strings.Replace(*p, "["+old+"]", "["+store+"]", 1), vm.Name, folder, 1)
			}
			for _, d := range vm.Config.Hardware.Device {
				if vd, ok := d.(*types.VirtualDisk); ok {
					b := vd.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
					b.FileName = strings.Replace(b.FileName, "["+old+"] "+vm.Name, "["+store+"] "+folder, 1)
				}
			}
		}
	}
}
