package consul

import (
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// edge is what gateways at the edge of the mesh have in common: they let clients in that are not of
// the mesh, as their entries say.
type edge struct {
	gateway
	sds      string               // directory with certificates, in the place of a server of secrets
	services map[string]*upstream // by listener and name
}

func newEdge(c *Client, registration string) edge {
	return edge{gateway: newGateway(c, registration), services: map[string]*upstream{}}
}

// sdsKey is a key of ours.
const sdsKey = "sds_certificate_dir"

func (k *edge) decode(st *state) {
	if !k.gateway.decode(st) {
		return
	}
	k.services, k.sds = map[string]*upstream{}, ""
	if p := k.service.Proxy; p != nil {
		k.sds, _ = p.Config[sdsKey].(string)
	}
}

// always are the watches of every gateway at the edge.
func (k *edge) always() []watch {
	return []watch{k.client.roots(), k.client.mesh(), k.client.leaf(k.service.Service)}
}

// edgeSnap is a snapshot of such a gateway on its way.
type edgeSnap struct {
	*connect.Snapshot
	roots     *certs.Roots
	normalize connect.Normalize
	notices   connect.Notices
	to        *nouns
	slow      bool
}

// begin starts a snapshot; nil while something that must be known is not.
func (k *edge) begin(st *state, kind string) *edgeSnap {
	c := k.client
	roots, haveRoots := heard[*certs.Roots](st, c.roots().key)
	leaf, haveLeaf := heard[*certs.Leaf](st, c.leaf(k.service.Service).key)
	if !haveRoots || !haveLeaf || leaf.ID.TrustDomain != roots.TrustDomain {
		return nil
	}
	mesh, haveMesh := heard[meshEntry](st, c.mesh().key)
	all, _ := heard[peerings](st, c.peerings().key)
	e := &edgeSnap{roots: roots, notices: slices.Clone(k.notices), to: k.nouns.next(), slow: !haveMesh}
	peers := all.trusted(roots.TrustDomain, &e.notices)
	e.normalize, _ = mesh.decode(&e.notices)
	_, outgoing := mesh.tls(&e.notices)
	e.Snapshot = &connect.Snapshot{Proxy: k.proxy(kind, roots.TrustDomain), Outgoing: outgoing,
		Leaves: map[connect.LeafName]*certs.Leaf{connect.OwnLeaf: leaf}, Bundles: bundles(roots, peers), Peers: all.shown()}
	return e
}

// done completes a snapshot.
func (k *edge) done(e *edgeSnap) (snap *connect.Snapshot, slow bool) {
	k.end(e.Snapshot, e.to, e.notices)
	return e.Snapshot, e.slow
}

// upstream is a service behind a listener: the one of before, if it is declared alike.
func (k *edge) upstream(d *declared, old map[string]*upstream) *upstream {
	d.group = connect.GroupName(d.name)
	d.dc = k.own()
	if p := k.service.Proxy; p != nil {
		d.gateway = p.MeshGateway.Mode
	}
	x := old[d.name]
	if x == nil || !reflect.DeepEqual(x.declared, d) {
		x = newUpstream(k.client, d, k.own())
	}
	k.services[d.name] = x
	return x
}

// behind adds what a service leads to.
func (e *edgeSnap) behind(st *state, x *upstream) {
	x.follow(st)
	e.slow = !x.lead(st, e.to, e.roots.TrustDomain) || e.slow
	e.notices = append(e.notices, x.notices()...)
}

// open adds a listener at each address of the gateway. One that leads nowhere is not opened.
func (k *edge) open(e *edgeSnap, name string, port int, l connect.Listener) {
	if len(l.Branches[0].Chain.Routes) == 0 {
		return
	}
	for _, b := range k.binds {
		one := l
		one.Name, one.Role, one.Bind = name+"_"+strings.TrimPrefix(b.name, "relay_"), connect.Edge, connect.Bind{Address: b.bind.Address, Port: port}
		e.to.listener(&one)
	}
}

// show adds a certificate to those of a door.
func (e *edgeSnap) show(door *connect.Door, name string, leaf *certs.Leaf, names []string) {
	at := connect.LeafName("edge-" + connect.SafeName(name))
	e.Leaves[at] = leaf
	door.Certificates = append(door.Certificates, connect.Certificate{Leaf: at, Names: names})
}

// entries returns the watch for the config entries of a kind, with this name if it is not "", whose form
// is T; its answers are []T. It asks for the list: a query for a single entry loses the index while there is none.
func entries[T any](c *Client, kind, name string) watch {
	return watch{key: "entries\x00" + kind + "\x00" + name, name: kind, fetch: func(ctx context.Context, cur *cursor) (any, error) {
		var raw []json.RawMessage
		meta, err := c.api.Raw().Query("/v1/config/"+kind, &raw, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		var list []T
		for _, text := range raw {
			var of struct{ Name string }
			if err := json.Unmarshal(text, &of); err != nil {
				return nil, err
			}
			if name != "" && of.Name != name {
				continue
			}
			var one T
			if err := json.Unmarshal(text, &one); err != nil {
				return nil, fmt.Errorf("%s %s: %w", kind, of.Name, err)
			}
			list = append(list, one)
		}
		cur.advance(meta)
		return list, nil
	}}
}

// boundService is a service of a gateway at the edge, or one that is linked to a terminating gateway. The
// library's type leaves AutoHostRewrite out.
type boundService struct {
	Service                        struct{ Name string }
	Port                           int
	Hosts                          []string
	CAFile, CertFile, KeyFile, SNI string
	ServiceKind                    string
	AutoHostRewrite                bool
}

// gatewayServices returns the watch for the services of a gateway, wildcards resolved; its answers are
// []boundService, sorted by port and name.
func (c *Client) gatewayServices(name string) watch {
	return watch{key: "gateway services\x00" + name, name: "services of the gateway", fetch: func(ctx context.Context, cur *cursor) (any, error) {
		var list []boundService
		meta, err := c.api.Raw().Query("/v1/catalog/gateway-services/"+name, &list, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		list = slices.DeleteFunc(list, func(s boundService) bool { return certs.ServiceName(s.Service.Name) != nil })
		slices.SortFunc(list, func(a, b boundService) int {
			return cmp.Or(a.Port-b.Port, strings.Compare(a.Service.Name, b.Service.Name))
		})
		return list, nil
	}}
}

// pemEvery is how often a file with a certificate is looked at.
const pemEvery = 2 * time.Second

// pemFile returns the watch for a file that has a certificate and its key; its answers are *certs.Leaf.
func pemFile(certFile, keyFile string) watch {
	return watch{key: "file\x00" + certFile + "\x00" + keyFile, name: "certificate " + certFile, every: pemEvery, shapes: never,
		same: func(a, b any) bool { return a.(*certs.Leaf).Fingerprint == b.(*certs.Leaf).Fingerprint },
		fetch: func(context.Context, *cursor) (any, error) {
			chain, err := os.ReadFile(certFile)
			if err != nil {
				return nil, fileError{err}
			}
			key := chain
			if keyFile != certFile {
				if key, err = os.ReadFile(keyFile); err != nil {
					return nil, fileError{err}
				}
			}
			leaf, err := pair(string(chain), string(key))
			if err != nil {
				return nil, fileError{fmt.Errorf("%s: %w", certFile, err)}
			}
			return leaf, nil
		}}
}

// fileError is of a file of ours, while the agent may be well.
type fileError struct{ error }

func (e fileError) Unwrap() error { return e.error }

// pair reads a certificate and a key, which may be in one text.
func pair(chain, key string) (*certs.Leaf, error) {
	leaf, err := certs.ParsePair(blocks(chain, "CERTIFICATE"), blocks(key, "PRIVATE KEY"))
	if err != nil {
		return nil, err
	}
	if time.Now().After(leaf.NotAfter) {
		return nil, fmt.Errorf("the certificate ended %s", leaf.NotAfter.UTC().Format(time.DateTime))
	}
	return leaf, nil
}

// blocks are the PEM blocks of a text whose type ends so.
func blocks(text, kind string) string {
	var out []byte
	for rest := []byte(text); ; {
		var one *pem.Block
		if one, rest = pem.Decode(rest); one == nil {
			return string(out)
		}
		if strings.HasSuffix(one.Type, kind) {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: one.Type, Bytes: one.Bytes})...)
		}
	}
}

// sdsFile is the file of a certificate that an entry names for a server of secrets, in whose place a
// directory has files.
func sdsFile(dir, resource string) (string, bool) {
	if dir == "" || resource == "" || resource != connect.SafeName(resource) {
		return "", false
	}
	return filepath.Join(dir, resource+".pem"), true
}

// edits reads header rules of an entry that is no chain's.
func edits(where string, m *api.HTTPHeaderModifiers, key string, n *connect.Notices) connect.HeaderEdits {
	c := &compiler{compiled: &compiled{}, up: &declared{where: where}}
	out := c.edits(m, key)
	*n = append(*n, c.notices...)
	return out
}

// site makes the routes of a service at a listener of http out of its chain.
func site(x *upstream, name string, hosts []string, request, answer connect.HeaderEdits) (out []connect.Route) {
	for _, r := range x.made.listener.Branches[0].Chain.Routes {
		r.Site, r.Hosts, r.SiteRequest, r.SiteAnswer = name, hosts, request, answer
		out = append(out, r)
	}
	return out
}

// edgeHost reports whether a text can be a host of a listener: a name, perhaps with a port, perhaps
// with one "*" at its beginning or end.
func edgeHost(s string) bool {
	if s == "*" {
		return true
	}
	bare := strings.TrimSuffix(strings.TrimPrefix(s, "*"), "*")
	return bare != "" && len(s) <= 260 && strings.Count(s, "*") <= 1 && !strings.ContainsFunc(bare, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-._:[]", r))
	})
}

// hostsAt are hosts as they stand in requests to a port: with and without it.
func hostsAt(hosts []string, port int) (out []string) {
	for _, h := range hosts {
		out = append(out, h)
		if !strings.Contains(h, ":") && !strings.HasSuffix(h, "*") {
			out = append(out, fmt.Sprintf("%s:%d", h, port))
		}
	}
	return out
}
