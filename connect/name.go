package connect

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// maxName keeps names of frontends, backends and servers readable in logs;
// HAProxy takes more.
const maxName = 80

// SafeName turns text from Consul into a name that HAProxy takes anywhere:
// letters, digits, "-", "_" and "."; a "-" at the beginning is replaced, too, as it would
// be read as an option. If anything had to be replaced or cut, a digest of the original
// is added, so that different texts keep different names.
func SafeName(s string) string {
	changed, first := false, true
	out := strings.Map(func(r rune) rune {
		option := first && r == '-'
		first = false
		switch {
		case option:
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
			return r
		}
		changed = true
		return '_'
	}, s)
	if len(out) > maxName {
		out, changed = out[:maxName], true
	}
	if out == "" { // the name must not begin with the digest's dash
		out, changed = "_", true
	}
	if changed {
		out += "-" + Digest(s)
	}
	return out
}

// Digest is a short name for a text: 16 hexadecimal digits, enough that somebody who chooses
// the texts does not find two with the same digest within minutes.
func Digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
