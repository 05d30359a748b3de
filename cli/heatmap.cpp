// heatmap.cpp: a panel for each head: a row for each token, dark where it looks.
#include "cli/heatmap.h"

#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#include <stb/stb_easy_font.h>
#include <stb/stb_image_write.h>

#include <array>
#include <cmath>

namespace {

using Color = std::array<unsigned char, 3>;
constexpr Color WHITE{255, 255, 255}, BLACK{40, 40, 40}, GRID{225, 225, 225}, DARKEST{8, 48, 107};
// A line's height, between panels, between a label and its row, letters of a label.
constexpr int LETTER = 12, GAP = 16, LABEL_GAP = 4, MOST_LETTERS = 12;

int width_of(std::string text) {
  return stb_easy_font_width(text.data());
}

class Image {
 public:
  Image(int width, int height)
      : width_(width), height_(height), pixels_(static_cast<size_t>(width) * static_cast<size_t>(height), WHITE) {}

  void fill(int x, int y, int width, int height, Color color) {
    for (int row = std::max(0, y); row < std::min(height_, y + height); row++)
      for (int column = std::max(0, x); column < std::min(width_, x + width); column++)
        pixels_[static_cast<size_t>(row) * static_cast<size_t>(width_) + static_cast<size_t>(column)] = color;
  }

  // Text whose first letter's upper left corner is at x, y; upwards: it is read from below, and begins at the foot.
  void write(int x, int y, std::string text, bool upwards = false) {
    struct Vertex {
      float x, y, z;
      unsigned char color[4];
    };
    std::vector<Vertex> corners(text.size() * 4 * 32 + 4);  // four of each rectangle of a letter
    const int bytes = static_cast<int>(corners.size() * sizeof(Vertex));
    const int rectangles = stb_easy_font_print(0, 0, text.data(), nullptr, corners.data(), bytes);
    for (int i = 0; i < rectangles; i++) {
      const Vertex &from = corners[static_cast<size_t>(i) * 4], &to = corners[static_cast<size_t>(i) * 4 + 2];
      const int left = static_cast<int>(from.x), top = static_cast<int>(from.y);
      const int width = static_cast<int>(to.x) - left, height = static_cast<int>(to.y) - top;
      if (upwards)
        fill(x + top, y - left - width, height, width, BLACK);
      else
        fill(x + left, y + top, width, height, BLACK);
    }
  }

  void save(OutputFile& file) const {
    const auto write = [](void* to, void* data, int n) {
      static_cast<OutputFile*>(to)->write(data, static_cast<size_t>(n));
    };
    if (!stbi_write_png_to_func(write, &file, width_, height_, 3, pixels_.data(), width_ * 3))
      fail("--heatmap: out of memory");
    file.commit();
  }

 private:
  int width_, height_;
  std::vector<Color> pixels_;
};

// A token as letters that the picture's font has: _ a space, ? what it lacks.
std::string label(const Tokenizer& tokenizer, int id) {
  std::string text = tokenizer.bytes(id).empty() ? tokenizer.text(id) : std::string(tokenizer.bytes(id)), out;
  for (const char c : text) {
    if ((c & 0xc0) == 0x80) continue;  // goes on with a character that is marked already
    out += c == ' ' ? '_' : c > ' ' && c <= '~' ? c : '?';
  }
  return out.size() <= MOST_LETTERS ? out : out.substr(0, MOST_LETTERS - 2) + "..";
}

Color shade(float weight) {
  Color color;
  for (size_t i = 0; i < 3; i++)
    color[i] = static_cast<unsigned char>(std::lround(255 + weight * static_cast<float>(DARKEST[i] - 255)));
  return color;
}

struct Panel {
  int cell, labels;  // pixels of a token's row, and before the first
  int size(int n_tokens) const { return labels + n_tokens * cell; }
};

void draw_head(Image& image, const Panel& panel, int left, int top, const AttentionMap& map, int head,
               const std::vector<std::string>& labels) {
  const int n = map.n_tokens, x = left + panel.labels, y = top + panel.labels;
  image.write(left, top, "head " + std::to_string(head));
  for (int t = 0; t < n; t++) {
    const std::string& text = labels[static_cast<size_t>(t)];
    const int middle = (panel.cell - LETTER) / 2 + 3;
    image.write(x - LABEL_GAP - width_of(text), y + t * panel.cell + middle, text);
    image.write(x + t * panel.cell + middle, y - LABEL_GAP, text, true);
    for (int seen = 0; seen < n; seen++) {
      const size_t at = (area(head, n) + static_cast<size_t>(t)) * static_cast<size_t>(n) + static_cast<size_t>(seen);
      const Color color = seen <= t ? shade(map.weights[at]) : WHITE;
      image.fill(x + seen * panel.cell, y + t * panel.cell, panel.cell, panel.cell, seen <= t ? GRID : WHITE);
      image.fill(x + seen * panel.cell, y + t * panel.cell, panel.cell - 1, panel.cell - 1, color);
    }
  }
}

// What a shade stands for.
void draw_scale(Image& image, int x, int y) {
  constexpr int STEPS = 10, WIDTH = 16;
  image.write(x, y, "weight 0");
  const int start = x + 60;
  for (int i = 0; i <= STEPS; i++)
    image.fill(start + i * WIDTH, y - 2, WIDTH, LETTER, shade(static_cast<float>(i) / STEPS));
  image.write(start + (STEPS + 1) * WIDTH + 8, y, "1");
}

}  // namespace

void check_heatmap(const Session& s) {
  const Config& c = s.model.config;
  if (s.prompt.size() > MOST_TOKENS_DRAWN)
    fail("--heatmap: the prompt has %zu tokens, at most %d can be drawn", s.prompt.size(), MOST_TOKENS_DRAWN);
  if (s.options.head >= c.n_heads) fail("--head %d: this model has heads 0 .. %d", s.options.head, c.n_heads - 1);
}

void draw(const Session& session, const AttentionMap& map) {
  const Options& o = session.options;
  std::vector<std::string> labels;
  int longest = width_of("head 00");
  for (const int id : session.prompt) {
    labels.push_back(label(session.tokenizer, id));
    longest = std::max(longest, width_of(labels.back()));
  }
  const int heads = o.head < 0 ? map.n_heads : 1, first = std::max(0, o.head);
  const int columns = static_cast<int>(std::ceil(std::sqrt(heads))), rows = (heads + columns - 1) / columns;
  const Panel panel{std::clamp(480 / map.n_tokens, LETTER + 2, 32), longest + 2 * LABEL_GAP};
  const int step = panel.size(map.n_tokens) + GAP, header = 3 * LETTER;
  Image image(std::max(GAP + columns * step, 520), GAP + header + rows * step);
  image.write(GAP, GAP, "layer " + std::to_string(map.layer) + ": what a row's token looks at");
  draw_scale(image, GAP + 250, GAP);
  for (int i = 0; i < heads; i++)
    draw_head(image, panel, GAP + i % columns * step, GAP + header + i / columns * step, map, first + i, labels);
  image.save(*session.output);
}
