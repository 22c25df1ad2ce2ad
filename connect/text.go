package connect

import (
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// Text is a snapshot for people and for goldens: every field that says something, one a
// line, and of certificates only whose they are. It quotes what came from outside.
func (s *Snapshot) Text() string {
	var b strings.Builder
	shown := *s
	if s.Leaf != nil {
		fmt.Fprintf(&b, "Leaf: %s\n", s.Leaf.ID)
	}
	if s.Roots != nil {
		fmt.Fprintf(&b, "Roots: %d of %s\n", s.Roots.Count, s.Roots.TrustDomain)
	}
	shown.Leaf, shown.Roots, shown.Policy, shown.Notices = nil, nil, nil, nil
	write(&b, "", reflect.ValueOf(shown))
	if s.Policy != nil {
		b.WriteString("Policy:\n")
		write(&b, "  ", reflect.ValueOf(s.Policy.Config()))
	}
	return b.String()
}

// write prints the exported fields of a struct that are not zero.
func write(b *strings.Builder, indent string, v reflect.Value) {
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.IsExported() && !v.Field(i).IsZero() {
			field(b, indent, f.Name, v.Field(i))
		}
	}
}

func field(b *strings.Builder, indent, name string, v reflect.Value) {
	for v.Kind() == reflect.Pointer && !v.IsNil() {
		v = v.Elem()
	}
	switch value := v.Interface().(type) {
	case time.Duration:
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, value)
		return
	case certs.SPIFFEID:
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, quote(value.String()))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		fmt.Fprintf(b, "%s%s:\n", indent, name)
		write(b, indent+"  ", v)
	case reflect.Slice:
		for i := range v.Len() {
			field(b, indent, fmt.Sprintf("%s %d", name, i+1), v.Index(i))
		}
	case reflect.Map:
		fmt.Fprintf(b, "%s%s: %d\n", indent, name, v.Len())
	case reflect.String:
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, quote(v.String()))
	default:
		fmt.Fprintf(b, "%s%s: %v\n", indent, name, v.Interface())
	}
}
