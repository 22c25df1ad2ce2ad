package consul

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/consul/api"
)

// chain is a compiled discovery chain as Consul sends it (agent/structs, discovery_chain.go):
// the library's type leaves fields out.
type chain struct {
	ServiceName string
	Protocol    string
	StartNode   string
	Nodes       map[string]*chainNode
	Targets     map[string]*chainTarget
}

type chainNode struct {
	Type         string
	Name         string
	Routes       []chainRoute
	Splits       []chainSplit
	Resolver     *chainResolver
	LoadBalancer *loadBalancer
}

type chainRoute struct {
	Definition *struct {
		Match *struct {
			HTTP *routeMatch
		}
		Destination *routeDestination
	}
	NextNode string
}

type routeMatch struct {
	PathExact, PathPrefix, PathRegex string
	CaseInsensitive                  bool
	Methods                          []string
	Header                           []struct {
		Name                                   string
		Present                                bool
		Exact, Prefix, Suffix, Contains, Regex string
		Invert                                 bool
	}
	QueryParam []struct {
		Name         string
		Present      bool
		Exact, Regex string
	}
}

type routeDestination struct {
	PrefixRewrite               string
	RequestTimeout, IdleTimeout span
	NumRetries                  uint32
	RetryOnConnectFailure       bool
	RetryOnStatusCodes          []uint32
	RetryOn                     []string
	RequestHeaders              *api.HTTPHeaderModifiers
	ResponseHeaders             *api.HTTPHeaderModifiers
}

type chainSplit struct {
	Definition *struct {
		RequestHeaders  *api.HTTPHeaderModifiers
		ResponseHeaders *api.HTTPHeaderModifiers
	}
	Weight   float64
	NextNode string
}

type chainResolver struct {
	ConnectTimeout, RequestTimeout span
	Default                        bool // no entry made it
	Target                         string
	Failover                       *struct{ Targets []string }
}

type chainTarget struct {
	Service, ServiceSubset, Datacenter, Peer, SNI string
	MeshGateway                                   struct{ Mode string }
	Subset                                        struct {
		Filter      string
		OnlyPassing bool
	}
}

type loadBalancer struct {
	Policy             string
	LeastRequestConfig *struct{ ChoiceCount int }
	HashPolicies       []struct {
		Field, FieldValue string
		CookieConfig      *struct {
			Session bool
			TTL     span
			Path    string
		}
		SourceIP, Terminal bool
	}
}

// span is a duration, which Consul writes as text in some places and as nanoseconds in
// others.
type span time.Duration

func (s *span) UnmarshalJSON(b []byte) error {
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	switch v := v.(type) {
	case nil:
	case float64:
		*s = span(v)
	case string:
		if v == "" {
			return nil
		}
		d, err := time.ParseDuration(v)
		*s = span(d)
		return err
	default:
		return fmt.Errorf("%s is no duration", b)
	}
	return nil
}

// within is the duration, where it is one that HAProxy's timers can hold; else 0.
func (s span) within() time.Duration {
	if d := time.Duration(s); d >= -maxDuration && d <= maxDuration {
		return d
	}
	return 0
}

// chain returns the watch for the compiled discovery chain of an upstream; its answers are
// *chain. The upstream's own settings are part of the query.
func (c *Client) chain(d *declared) watch {
	opts := &api.DiscoveryChainOptions{EvaluateInDatacenter: d.dc, OverrideProtocol: string(d.protocol), OverrideConnectTimeout: d.connect, OverrideMeshGateway: api.MeshGatewayConfig{Mode: d.gateway}}
	about := "chain\x00" + d.service + "\x00" + d.dc
	name := "chain of " + destination{service: d.service, dc: d.dc, other: d.other}.said()
	return watch{key: fmt.Sprintf("%s\x00%s\x00%s\x00%s", about, d.protocol, d.connect, d.gateway), subject: about, name: name,
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			var body bytes.Buffer
			got, meta, err := c.api.DiscoveryChain().Get(d.service, opts, cur.cached(context.WithValue(ctx, bodyKey{}, &body)))
			if err != nil {
				return nil, err
			}
			if got == nil || got.Chain == nil {
				return nil, errors.New("empty discovery chain")
			}
			var whole struct{ Chain *chain }
			if err := json.Unmarshal(body.Bytes(), &whole); err != nil {
				return nil, fmt.Errorf("discovery chain of %s: %w", d.service, err)
			}
			cur.advance(meta)
			return whole.Chain, nil
		}}
}
