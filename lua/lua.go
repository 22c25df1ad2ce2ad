// Package lua holds the Lua that runs inside HAProxy, embedded, with the names
// that it registers there.
//
// It imports nothing; haproxy/render and cmd use it.
package lua

import _ "embed"

// Spiffe is the source of the filter that checks the SPIFFE ID of a server.
//
//go:embed spiffe.lua
var Spiffe string

// Deny is the source of the service that denies a request with a body, for versions of HAProxy
// that would lose the answer.
//
//go:embed deny.lua
var Deny string

// Routes has what conditions and time limits of routes need.
//
//go:embed routes.lua
var Routes string

// Body has the limit on a request's body.
//
//go:embed body.lua
var Body string

// Names shared by the script and the rendered configuration.
const (
	DenyFile      = "deny.lua"
	DenyService   = "lua.deny"
	RoutesFile    = "routes.lua"
	Joined        = "joined"    // sample fetch in Routes: a header's lines, joined
	TotalFilter   = "lua.total" // filter in Routes: the time limit of a whole answer
	BodyFile      = "body.lua"
	BodyFilter    = "lua.body" // filter in Body
	SpiffeFile    = "spiffe.lua"
	SpiffeFilter  = "lua.spiffe"
	SpiffeSlot    = "slot"             // argument: expected IDs are in SpiffeIDsVar
	SpiffeArmed   = "txn.spiffe_armed" // true once the filter watches the stream
	SpiffeIDsVar  = "txn.spiffe_ids"
	SpiffeIDsMark = "|" // before each ID in SpiffeIDsVar; cannot occur in one
)
