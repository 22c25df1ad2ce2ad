package render

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// edge is where clients outside the mesh connect.
func (f *file) edge(made *front, to [][]way) *builder {
	l := made.listener
	b := section(Frontend, frontendName(l))
	http := l.Protocol().IsHTTP()
	b.mode(http)
	b.add("bind %s%s", bind(b, l.Bind), f.edgeTLS(b, l)).add("maxconn %d", max(f.share/2, 1)).add("timeout client %s", ms(l.Idle))
	if f.HelloTimeout && l.Door != nil && len(l.Door.Certificates) > 0 {
		b.add("timeout client-hs 10s")
	}
	most(b, l)
	f.log(b, http)
	if !http {
		direct(b, &to[0][0])
		return b
	}
	b.add("option idle-close-on-response")
	says(b, "at the edge of the mesh", "no endpoint answered", "no healthy endpoint", "the endpoint did not answer in time")
	requests(b)
	door := l.Door
	if door == nil {
		door = &connect.Door{}
	}
	normalize(b, door.Normalize)
	b.add("http-request del-header X-Forwarded-Client-Cert")
	b.add("http-request set-header X-Forwarded-Proto %s", map[bool]string{true: "https", false: "http"}[len(door.Certificates) > 0])
	b.add("http-response set-var(txn.answered) bool(true)")
	b.add("http-after-response set-status 503 if { status 502 } !{ var(txn.answered) -m bool }")
	f.Maps[PolicyMap].Read = true
	closing(b, f)
	f.chain(b, made, to)
	return b
}

// sound is the chain of a listener without the sites that cannot be rendered: a broken route of one
// host must not take down the others.
func (f *file) sound(l *connect.Listener) *connect.Chain {
	c := &l.Branches[0].Chain
	bad := map[string]bool{}
	for i := range c.Routes {
		r := &c.Routes[i]
		n := newNaming(section(Frontend, "trial"))
		one := &connect.Chain{Routes: []connect.Route{*r}}
		n.headers(one)
		n.route(r, 0, "trial")
		n.changes(r, 0, "trial")
		for _, h := range r.Hosts {
			n.b.check("host", strings.Trim(h, "*")+"x")
		}
		if n.b.err != nil && !bad[r.Site] {
			bad[r.Site] = true
			f.refused = append(f.refused, &Refused{Listener: l, Site: r.Site, Err: n.b.err})
		}
	}
	if len(bad) == 0 {
		return c
	}
	return &connect.Chain{Routes: slices.DeleteFunc(slices.Clone(c.Routes), func(r connect.Route) bool { return bad[r.Site] })}
}

// edgeTLS is the rest of the bind line of a listener with certificates.
func (f *file) edgeTLS(b *builder, l *connect.Listener) string {
	if l.Door == nil || len(l.Door.Certificates) == 0 {
		return ""
	}
	list := "tls/" + connect.SafeName(l.Name) + ".list"
	text := ""
	for i, c := range l.Door.Certificates {
		names := slices.Clone(c.Names)
		if i == 0 {
			names = append(names, "dummy.invalid") // a name filter, or 2.6 forgets the line when the certificate is replaced
		}
		for _, name := range names {
			b.check("server name", name)
		}
		if leaf := f.snap.Leaves[c.Leaf]; leaf != nil {
			f.Leaves[LeafFile(c.Leaf)] = leaf
		} else {
			b.fail(fmt.Errorf("there is no certificate %.80q", c.Leaf))
		}
		text += f.path(LeafFile(c.Leaf)) + " " + strings.Join(names, " ") + "\n"
	}
	f.Files[list] = text
	out := " ssl crt-list " + f.path(list) + " ssl-min-ver TLSv" + cmp.Or(l.Door.TLS.Min, "1.2")
	if l.Door.TLS.Max != "" {
		out += " ssl-max-ver TLSv" + l.Door.TLS.Max
	}
	if c := l.Door.TLS.Ciphers; c != "" {
		out += " ciphers " + b.check("ciphers", opensslNames.Replace(c))
	}
	switch {
	case l.Protocol().IsHTTP2():
		out += " alpn h2,http/1.1"
	case l.Protocol().IsHTTP():
		out += " alpn http/1.1"
	}
	return out
}

// site finds whose hosts a request is for: the exact one, the longest ending, the longest beginning,
// or any. Hosts but for endings are in maps, whose keys begin with that of the frontend.
func (f *file) site(n *naming, c *connect.Chain) {
	b := n.b
	f.need(HostsMap)
	f.need(BeginningsMap)
	b.add("http-request set-var(txn.host) req.fhdr(host),lower")
	var endings [][2]string // of hosts and their sites
	any := ""
	for i := range c.Routes {
		r := &c.Routes[i]
		if i > 0 && r.Site == c.Routes[i-1].Site {
			continue
		}
		b.check("site", r.Site)
		for _, host := range r.Hosts {
			ending, is := strings.CutPrefix(host, "*")
			b.check("host", cmp.Or(ending, "any"))
			switch {
			case host == "*":
				any = cmp.Or(any, r.Site)
			case is:
				endings = append(endings, [2]string{strings.ToLower(ending), r.Site})
			}
		}
	}
	b.add("http-request set-var(txn.name) str(%s),concat(,txn.host)", f.hostsKey(b))
	b.add("http-request set-var(txn.site) var(txn.name),map_str(%s)", f.path(HostsMap))
	slices.SortStableFunc(endings, func(a, b [2]string) int { return len(b[0]) - len(a[0]) })
	for _, e := range endings {
		b.add("http-request set-var(txn.site) str(%s) if !{ var(txn.site) -m found } { var(txn.host) -m end -- %s }", e[1], e[0])
	}
	b.add("http-request set-var(txn.site) var(txn.name),map_beg(%s) if !{ var(txn.site) -m found }", f.path(BeginningsMap))
	if any != "" {
		b.add("http-request set-var(txn.site) str(%s) if !{ var(txn.site) -m found }", any)
	}
	b.add("http-request return status 404 unless { var(txn.site) -m found }")
	b.add("http-request set-var(txn.route) var(txn.site)")
}

func (f *file) hostsKey(b *builder) string { return b.name + "/" }

// hosts are the entries by which sites are found.
func (f *file) hosts(b *builder, c *connect.Chain) (out []liveEntry) {
	seen := map[string]bool{}
	for i := range c.Routes {
		r := &c.Routes[i]
		for _, host := range r.Hosts {
			host = strings.ToLower(host)
			file, key := HostsMap, host
			if beginning, is := strings.CutSuffix(host, "*"); is {
				file, key = BeginningsMap, beginning
			}
			if strings.HasPrefix(host, "*") || seen[host] {
				continue
			}
			seen[host] = true
			out = append(out, liveEntry{file, Entry{f.hostsKey(b) + key, r.Site}})
		}
	}
	return out
}

// routeKeys are the names of a chain's routes: their numbers, or of a site's the site and the number
// there. The site itself is the name of its only route, if that takes everything.
func routeKeys(c *connect.Chain) []string {
	routes := map[string]int{}
	for i := range c.Routes {
		routes[c.Routes[i].Site]++
	}
	out, at := make([]string, len(c.Routes)), map[string]int{}
	for i := range c.Routes {
		r := &c.Routes[i]
		at[r.Site]++
		switch {
		case r.Site == "":
			out[i] = strconv.Itoa(i + 1)
		case routes[r.Site] == 1 && r.Match.Everything():
			out[i] = r.Site
		default:
			out[i] = fmt.Sprintf("%s:%d", r.Site, at[r.Site])
		}
	}
	return out
}
