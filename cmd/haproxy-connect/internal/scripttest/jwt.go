package scripttest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/rogpeppe/go-internal/testscript"
)

// issuer signs tokens and serves its keys.
type issuer struct {
	key  *ecdsa.PrivateKey
	mu   sync.Mutex
	mode string // ok, hang, 500, lie
	stop chan struct{}
}

func (i *issuer) jwks() []byte {
	b, _ := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}})
	return b
}

// cmdIssuer runs "issuer NAME [MODE]": it makes a signer of tokens. $NAME_JWKS is its key set in base64, $NAME_FILE a file
// with the key set, $NAME_URI where it is served. MODE makes that server hang, answer 500 or serve invalid keys (lie).
func (w *world) cmdIssuer(ts *testscript.TestScript, _ bool, args []string) {
	i := w.issuers[args[0]]
	if i == nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ts.Check(err)
		i = &issuer{key: key, mode: "ok", stop: make(chan struct{})}
		w.issuers[args[0]] = i
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		ts.Check(err)
		w.env.Defer(func() {
			close(i.stop)
			ln.Close()
		})
		go func() { _ = http.Serve(ln, i) }()
		ts.Setenv(args[0]+"_JWKS", base64.StdEncoding.EncodeToString(i.jwks()))
		ts.Setenv(args[0]+"_URI", "http://"+ln.Addr().String()+"/jwks")
		file := w.dir + "/" + args[0] + ".jwks"
		ts.Check(os.WriteFile(file, i.jwks(), 0o644))
		ts.Setenv(args[0]+"_FILE", file)
	}
	if len(args) > 1 {
		i.mu.Lock()
		i.mode = args[1]
		i.mu.Unlock()
	}
}

func (i *issuer) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	mode := i.mode
	i.mu.Unlock()
	switch mode {
	case "hang":
		select {
		case <-i.stop:
		case <-r.Context().Done():
		}
	case "500":
		rw.WriteHeader(http.StatusInternalServerError)
	case "lie":
		fmt.Fprint(rw, `{"keys":[{"kty":"EC"}]}`)
	default:
		_, _ = rw.Write(i.jwks())
	}
}

// cmdJWT runs "jwt VAR ISSUER CLAIMS": it sets $VAR to a token with these claims.
func (w *world) cmdJWT(ts *testscript.TestScript, _ bool, args []string) {
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: w.issuers[args[1]].key, KeyID: "k1"}}, nil)
	ts.Check(err)
	jws, err := s.Sign([]byte(args[2]))
	ts.Check(err)
	text, err := jws.CompactSerialize()
	ts.Check(err)
	ts.Setenv(args[0], text)
}

// cmdHeader runs "header NAME REGEXP URL [H=V]": it repeats the request until this header of the answer matches.
func (w *world) cmdHeader(ts *testscript.TestScript, _ bool, args []string) {
	re, err := regexp.Compile(args[1])
	ts.Check(err)
	last := ""
	if err := eventually(patience, func() error {
		res, err := getOnce(args[2:])
		if err != nil {
			return err
		}
		if last = res.Header.Get(args[0]); !re.MatchString(last) {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		ts.Fatalf("%s: %s is %q, want %s (%v)\n%s", args[2], args[0], last, re, err, w.allLogs())
	}
}

// getOnce requests args[0], a URL, with the headers HEADER=VALUE that follow it, on a
// connection of its own. The body is closed.
func getOnce(args []string) (*http.Response, error) {
	req, err := http.NewRequest(http.MethodGet, args[0], nil)
	if err != nil {
		return nil, err
	}
	for _, h := range args[1:] {
		k, v, _ := strings.Cut(h, "=")
		req.Header.Set(k, v)
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}).Do(req)
	if err == nil {
		res.Body.Close()
	}
	return res, err
}
