package connect

import "time"

// Extras are what a listener can do beyond what Consul's entries say. The zero value is nothing.
type Extras struct {
	Rates []RateLimit // at most MaxRates
	// MaxBody limits the bytes of a request's body; 0: no limit.
	MaxBody int
}

// MaxRates is how many rates HAProxy can count for one request.
const MaxRates = 3

// RateLimit is how much one client may ask: requests, or connections of tcp. At a Public
// listener each identity is a client, at a Local one the application is the only client.
type RateLimit struct {
	Path     string // a prefix: only requests under it count; "" is all
	Requests int    // > 0, in any span of Per
	Per      time.Duration
}

// Queue bounds what waits for the endpoints of a target. The zero value bounds nothing.
type Queue struct {
	PerEndpoint int           // requests, or connections of tcp, under way at one endpoint; 0: no limit, and nothing waits
	Max         int           // that wait for any endpoint of the target; 0: no limit
	Timeout     time.Duration // of the wait; 0: the default of every group
}

// SnippetName names lines in HAProxy's own words, and where they stand.
type SnippetName string

// The places. A group may have lines of its own in place of UpstreamSnippet.
const (
	GlobalSnippet   SnippetName = "global"
	DefaultsSnippet SnippetName = "defaults"
	PublicSnippet   SnippetName = "public"
	UpstreamSnippet SnippetName = "upstream"
)
