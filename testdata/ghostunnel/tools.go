//go:build tools

package ghostunnel

import _ "github.com/ghostunnel/ghostunnel"
