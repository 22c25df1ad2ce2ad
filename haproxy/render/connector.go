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

func (o *Options) tlsOptions(alpn string) string {
	s := fmt.Sprintf(" ssl crt %s ca-file %s verify required no-ssl-reuse", o.path(LeafFile), o.path(RootsFile))
	if alpn != "" {
		s += " alpn " + alpn
	}
	return s
}

// class groups upstreams whose connectors are alike.
func class(u *connect.Upstream) string {
	kind := "t"
	switch {
	case u.Protocol.IsHTTP2():
		kind = "h2"
	case u.Protocol.IsHTTP():
		kind = "h1"
	}
	return fmt.Sprintf("%s-%d", kind, u.ConnectTimeout.Milliseconds())
}

// ClassALPN is the protocol that connectors of a class offer; "" none.
func ClassALPN(class string) string {
	switch {
	case strings.HasPrefix(class, "h2-"):
		return "h2"
	case strings.HasPrefix(class, "h1-"):
		return "http/1.1"
	}
	return ""
}

// ClassTimeout bounds connecting and shaking hands in a class.
func ClassTimeout(class string) time.Duration {
	_, t, _ := strings.Cut(class, "-")
	n, _ := strconv.Atoi(t)
	return time.Duration(max(n, 1)) * time.Millisecond
}

// slotValue is what a connector must know of an endpoint: where, and who.
func slotValue(t *connect.Target, e *connect.Endpoint) string {
	return e.Address + "|" + strconv.Itoa(e.Port) + lua.SpiffeIDsMark + strings.ReplaceAll(idList(t.IDs), " ", lua.SpiffeIDsMark)
}

// ParseSlotValue takes apart what slotValue made.
func ParseSlotValue(v string) (addr string, ids []string) {
	part := strings.Split(v, "|")
	if len(part) < 3 {
		return "", nil
	}
	return net.JoinHostPort(part[0], part[1]), part[2:]
}

// connector is hop 2 of a class: from the socket of a slot to mutual TLS with the
// endpoint that the slot's map names.
func (o *Options) connector(t *SlotTable) ([]*Section, error) {
	in, out := section("frontend", "connect_"+t.Class), section("backend", "tls_"+t.Class)
	in.add("mode tcp").add("no log").add("timeout client 25h") // hop 1 decides when to close
	for i := 1; i <= t.Size; i++ {
		in.add("bind unix@%s id %d%s", o.path(SlotSocket(Slot{Class: t.Class, ID: i})), slotID(i), o.owned())
	}
	in.add("tcp-request content set-var(%s) so_id,map_int(%s)", lua.SpiffeIDsVar, o.path(SlotMapFile(t.Class)))
	in.add("tcp-request content reject unless { var(%s) -m found }", lua.SpiffeIDsVar)
	in.add("tcp-request content set-dst var(%s),field(1,|)", lua.SpiffeIDsVar)
	in.add("tcp-request content set-dst-port var(%s),field(2,|)", lua.SpiffeIDsVar)
	in.add("default_backend tls_%s", t.Class)
	out.add("mode tcp").add("retries 0").add("timeout connect %s", ms(ClassTimeout(t.Class))).add("timeout server 25h").add("timeout tunnel 25h")
	guard(out, lua.SpiffeSlot)
	out.add("server endpoint 0.0.0.0:0%s", o.tlsOptions(ClassALPN(t.Class)))
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
