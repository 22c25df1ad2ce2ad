package render

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// guard arms the identity filter, and refuses where it is not armed. With the
// options of tlsOptions these are the four parts without which no connector exists.
func guard(b *builder, ids string) {
	b.add("filter %s %s", lua.SpiffeFilter, ids)
	b.add("tcp-request content reject unless { var(%s) -m bool }", lua.SpiffeArmed)
}

func (o *Options) tlsOptions(c Class) string {
	s := fmt.Sprintf(" ssl crt %s ca-file %s verify required no-ssl-reuse", o.path(LeafFile(c.Leaf)), o.path(BundleFile(c.Bundle)))
	if c.ALPN != "" {
		s += " alpn " + c.ALPN
	}
	return s
}

// classOf is what the connectors of a target must be. A server that must be told a name is the
// Go originator's: HAProxy would look for that name in a certificate that has none.
func (o *Options) classOf(g *connect.Group, t *connect.Target) Class {
	c := Class{Timeout: g.Connect.Truncate(time.Millisecond), Leaf: t.Dial.Leaf, Bundle: t.Dial.Bundle}
	c.Go = o.Originator == Go || t.Dial.SNI != "" || t.Dial.Bundle != connect.OwnBundle
	switch {
	case g.Protocol.IsHTTP2():
		c.ALPN = "h2"
	case g.Protocol.IsHTTP():
		c.ALPN = "http/1.1"
	}
	return c
}

// sniMark begins the part of a slot's value that is no identity but the server's name.
const sniMark = "sni:"

// slotValue is what a connector must know of an endpoint: where, who, and by which name.
func slotValue(t *connect.Target, e *connect.Endpoint) string {
	v := e.Address + "|" + strconv.Itoa(e.Port) + lua.SpiffeIDsMark + strings.ReplaceAll(idList(t.Dial.IDs), " ", lua.SpiffeIDsMark)
	if t.Dial.SNI != "" {
		v += "|" + sniMark + t.Dial.SNI
	}
	return v
}

// ParseSlotValue takes apart what slotValue made.
func ParseSlotValue(v string) (addr string, ids []string, sni string) {
	part := strings.Split(v, "|")
	if len(part) < 3 {
		return "", nil, ""
	}
	ids = part[2:]
	if name, ok := strings.CutPrefix(ids[len(ids)-1], sniMark); ok {
		ids, sni = ids[:len(ids)-1], name
	}
	return net.JoinHostPort(part[0], part[1]), ids, sni
}

// connector is hop 2 of a class: from the socket of a slot to mutual TLS with the
// endpoint that the slot's map names.
func (o *Options) connector(t *SlotTable) ([]*Section, error) {
	class := t.Class.Name()
	in, out := section(Frontend, connectorFrontend(class)), section(Backend, connectorBackend(class))
	in.add("mode tcp").add("no log").add("timeout client 25h") // hop 1 decides when to close
	for i := 1; i <= t.Size; i++ {
		in.add("bind unix@%s id %d%s", o.path(SlotSocket(Slot{Class: class, ID: i})), slotID(i), o.owned())
	}
	in.add("tcp-request content set-var(%s) so_id,map_int(%s)", lua.SpiffeIDsVar, o.path(SlotMapFile(class)))
	in.add("tcp-request content reject unless { var(%s) -m found }", lua.SpiffeIDsVar)
	in.add("tcp-request content set-dst var(%s),field(1,|)", lua.SpiffeIDsVar)
	in.add("tcp-request content set-dst-port var(%s),field(2,|)", lua.SpiffeIDsVar)
	in.add("default_backend %s", out.name)
	out.add("mode tcp").add("retries 0").add("timeout connect %s", ms(max(t.Class.Timeout, 1))).add("timeout server 25h").add("timeout tunnel 25h")
	guard(out, lua.SpiffeSlot)
	out.add("server endpoint 0.0.0.0:0%s", o.tlsOptions(t.Class))
	a, err := in.build("connectors: a socket for each endpoint of an HTTP upstream")
	if err != nil {
		return nil, err
	}
	b, err := out.build("connectors: mutual TLS, the server's SPIFFE ID checked before any byte")
	if err != nil {
		return nil, err
	}
	return []*Section{a, b}, nil
}
