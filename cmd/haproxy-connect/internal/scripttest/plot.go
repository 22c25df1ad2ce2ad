package scripttest

import (
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// plot is a picture of lines, both axes logarithmic: what is measured spans decades.
type plot struct {
	title, x, y string
	lines       []series
}

type series struct {
	name   string
	points []point
}

type point struct{ x, y float64 }

var colours = []string{"#1b6ca8", "#c44536", "#3a7d44", "#8d5a97", "#b8860b", "#5c5c5c", "#0f8b8d", "#e07a5f", "#3d405b", "#6a994e", "#9d4edd", "#bc4749"}

// svg draws the plot; the values are also text in the picture, for readers who cannot see it.
func (p plot) svg() string {
	const left, top, wide, high = 60.0, 40.0, 480.0, 320.0
	minX, maxX, minY, maxY := math.Inf(1), 0.0, math.Inf(1), 0.0
	for _, l := range p.lines {
		for _, at := range l.points {
			minX, maxX, minY, maxY = min(minX, at.x), max(maxX, at.x), min(minY, at.y), max(maxY, at.y)
		}
	}
	minY, maxY = math.Pow(10, math.Floor(math.Log10(minY))), math.Pow(10, math.Ceil(math.Log10(maxY)))
	x := func(v float64) float64 { return left + wide*math.Log(v/minX)/math.Log(maxX/minX) }
	y := func(v float64) float64 { return top + high - high*math.Log(v/minY)/math.Log(maxY/minY) }
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 420" font-family="sans-serif" font-size="12" role="img"><title>%s</title>`+"\n", html.EscapeString(p.title))
	b.WriteString(`<rect width="820" height="420" fill="#fff"/>` + "\n")
	fmt.Fprintf(&b, `<text x="%g" y="22" font-size="15">%s</text><text x="%g" y="405" text-anchor="middle">%s</text><text x="8" y="%g">%s</text>`+"\n",
		left, html.EscapeString(p.title), left+wide/2, html.EscapeString(p.x), top-6, html.EscapeString(p.y))
	for v := minY; v <= maxY*1.01; v *= 10 {
		fmt.Fprintf(&b, `<line x1="%g" x2="%g" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%g" y="%.1f" text-anchor="end">%g</text>`+"\n", left, left+wide, y(v), y(v), left-6, y(v)+4, round(v))
	}
	seen := map[float64]bool{}
	for i, l := range p.lines {
		colour := colours[i%len(colours)]
		var path, values []string
		for _, at := range l.points {
			if !seen[at.x] {
				seen[at.x] = true
				fmt.Fprintf(&b, `<text x="%.1f" y="%g" text-anchor="middle">%g</text>`+"\n", x(at.x), top+high+18, at.x)
			}
			path = append(path, fmt.Sprintf("%.1f,%.1f", x(at.x), y(at.y)))
			values = append(values, fmt.Sprintf("%g: %g", at.x, round(at.y)))
		}
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"><title>%s: %s</title></polyline>`+"\n",
			strings.Join(path, " "), colour, html.EscapeString(l.name), strings.Join(values, ", "))
		row := top + 10 + 20*float64(i)
		fmt.Fprintf(&b, `<rect x="560" y="%g" width="14" height="4" fill="%s"/><text x="580" y="%g">%s</text>`+"\n", row, colour, row+6, html.EscapeString(l.name))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func round(v float64) float64 {
	if v == 0 {
		return 0
	}
	scale := math.Pow(10, 2-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

func sourceDir(ts *testscript.TestScript) string {
	dir, err := filepath.Abs(filepath.Join("..", "..")) // the test runs in the package's directory
	ts.Check(err)
	return dir
}

func writePlot(ts *testscript.TestScript, name string, p plot) {
	ts.Check(os.WriteFile(filepath.Join(sourceDir(ts), "testdata", "measure", name), []byte(p.svg()), 0o644))
}
