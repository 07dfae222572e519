# Runs inside a guest that is not running (guestfish): binds the names by which its network is configured to the addresses of its cards, so that
# they survive other hardware. Given: MACS, in the cards' order; ROOT, empty but in tests. Says: `pinned NAME MAC`, `left WHY`.
cd / || exit 1
said() { echo "$*"; }
first() { sed -n "$1" "$2" | head -n 1; }
configured() {
    for f in "$ROOT"/etc/network/interfaces "$ROOT"/etc/network/interfaces.d/*; do
        [ -f "$f" ] && sed -n 's/^[[:space:]]*iface[[:space:]]\{1,\}\([^[:space:]]\{1,\}\).*/\1 -/p' "$f"
    done
    for f in "$ROOT"/etc/sysconfig/network-scripts/ifcfg-* "$ROOT"/etc/sysconfig/network/ifcfg-*; do
        [ -f "$f" ] || continue
        n=$(first 's/^DEVICE=["'\'']\{0,1\}\([A-Za-z0-9_.-]*\).*/\1/p' "$f")
        m=$(first 's/^HWADDR=["'\'']\{0,1\}\([0-9A-Fa-f:]*\).*/\1/p' "$f")
        said "${n:-${f##*/ifcfg-}} ${m:--}"
    done
    for f in "$ROOT"/etc/NetworkManager/system-connections/*; do
        [ -f "$f" ] || continue
        n=$(first 's/^interface-name=\([A-Za-z0-9_.-]*\).*/\1/p' "$f")
        m=$(first 's/^mac-address=\([0-9A-Fa-f:]*\).*/\1/p' "$f")
        [ -n "$n" ] && said "$n ${m:--}"
    done
    for f in "$ROOT"/etc/netplan/*.yaml "$ROOT"/etc/netplan/*.yml; do
        [ -f "$f" ] && sed -n 's/^[[:space:]]\{1,\}"\{0,1\}\(e[a-z0-9]*\)"\{0,1\}:[[:space:]]*$/\1 -/p' "$f"
    done
    for f in "$ROOT"/etc/systemd/network/*.network; do
        [ -f "$f" ] && sed -n 's/^Name=\([A-Za-z0-9_-]*\)[[:space:]]*$/\1 -/p' "$f"
    done
}
# Names of cards only, each once; the order is that in which VMware numbers its slots, and that of eth0, eth1, …
known=$(configured | while read -r n m; do
    case $n in
        *[!A-Za-z0-9]*) ;;
        ens[0-9]*) said "$(((${n#ens} % 32) * 100000 + ${n#ens})) $n $m" ;;
        eth[0-9]*) said "${n#eth} $n $m" ;;
        en[opx]* | em[0-9]* | p[0-9]*p[0-9]*) said "0 $n $m" ;;
    esac
done 2>/dev/null | sort -k1,1n -k2 -u)
pin() {
    if [ -d "$ROOT"/lib/systemd ] || [ -d "$ROOT"/usr/lib/systemd ]; then
        mkdir -p "$ROOT"/etc/systemd/network || exit 1
        # The path: bridges and the like may bear the card's address, too, and lie on no bus.
        printf '[Match]\nMACAddress=%s\nPath=*pci-*\n\n[Link]\nName=%s\n' "$2" "$1" > "$ROOT"/etc/systemd/network/10-hypersdk-"$1".link || exit 1
    else
        mkdir -p "$ROOT"/etc/udev/rules.d || exit 1
        printf 'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{address}=="%s", ATTR{type}=="1", NAME="%s"\n' "$2" "$1" \
            >> "$ROOT"/etc/udev/rules.d/70-persistent-net.rules || exit 1
    fi
    said "pinned $1 $2"
}
free_macs=
for mac in $MACS; do
    if cat "$ROOT"/etc/systemd/network/*.link "$ROOT"/etc/udev/rules.d/*persistent-net*.rules 2>/dev/null | grep -qi "$mac"; then
        said "left $mac is bound to a name already"
        continue
    fi
    name=$(said "$known" | while read -r _ n m; do
        [ "$(said "$m" | tr 'A-F' 'a-f')" = "$mac" ] && said "$n"
    done | head -n 1)
    if [ -n "$name" ]; then
        pin "$name" "$mac"
        bound="${bound:-} $name "
    else
        free_macs="$free_macs $mac"
    fi
done
free_names=
kinds=
while read -r _ n m; do
    [ -n "${n:-}" ] || continue
    case "${bound:-} $free_names " in *" $n "*) continue ;; esac
    [ "$m" = - ] || { said "left $n is configured for the address $m alone"; continue; }
    free_names="$free_names $n"
    case $n in
        ens1[6-9][0-9] | ens[2-9][0-9][0-9] | ens[1-9][0-9][0-9][0-9]) kinds="$kinds v" ;;
        eth*) kinds="$kinds e" ;;
        *) kinds="$kinds o" ;;
    esac
done <<EOF
$known
EOF
set -- $free_names
case $#:$kinds in
    0:*) [ -z "$free_macs" ] || said "left no interface is configured by its name" ;;
    1:*) for mac in $free_macs; do pin "$1" "$mac"; break; done ;;
    *v*e* | *e*v* | *o*) said "left which card has which name is not known:$free_names" ;;
    *) for mac in $free_macs; do [ $# -gt 0 ] || break; pin "$1" "$mac"; shift; done ;;
esac
exit 0
