// Package lua holds the Lua that runs inside HAProxy, embedded, with the names
// that it registers there.
//
// It imports nothing; haproxy/render uses it.
package lua

import _ "embed"

// Spiffe is the identity filter: the file's content, its name on disk, and the
// names it uses in HAProxy.
//
//go:embed spiffe.lua
var Spiffe string

// Deny is the service that denies a request with a body, for versions that lose the
// answer otherwise.
//
//go:embed deny.lua
var Deny string

// Routes has what conditions and time limits of routes need.
//
//go:embed routes.lua
var Routes string

// Names shared by the script and the rendered configuration.
const (
	DenyFile      = "deny.lua"
	DenyService   = "lua.deny"
	RoutesFile    = "routes.lua"
	Joined        = "joined"    // of Routes: a sample, a header's lines joined
	TotalFilter   = "lua.total" // of Routes
	SpiffeFile    = "spiffe.lua"
	SpiffeFilter  = "lua.spiffe"
	SpiffeSlot    = "slot"             // argument: expected IDs are in SpiffeIDsVar
	SpiffeArmed   = "txn.spiffe_armed" // true once the filter watches the stream
	SpiffeIDsVar  = "txn.spiffe_ids"
	SpiffeIDsMark = "|" // before each ID in SpiffeIDsVar; cannot occur in one
)
