class GraphModule(torch.nn.Module):
    def forward(self, L_self_modules_up_parameters_weight_: "f32[96, 48]", L_self_modules_up_parameters_bias_: "f32[96]", L_x_: "f32[3, 48]", L_self_modules_down_parameters_weight_: "f32[48, 96]", L_self_modules_lm_head_parameters_weight_: "f32[64, 48]", L_self_modules_lm_head_parameters_bias_: "f32[64]"):
        l_self_modules_up_parameters_weight_ = L_self_modules_up_parameters_weight_
        l_self_modules_up_parameters_bias_ = L_self_modules_up_parameters_bias_
        l_x_ = L_x_
        l_self_modules_down_parameters_weight_ = L_self_modules_down_parameters_weight_
        l_self_modules_lm_head_parameters_weight_ = L_self_modules_lm_head_parameters_weight_
        l_self_modules_lm_head_parameters_bias_ = L_self_modules_lm_head_parameters_bias_

        # File: tests/models/block.py:15 in forward, code: hidden = torch.relu(self.up(x))
        linear: "f32[3, 96]" = torch._C._nn.linear(l_x_, l_self_modules_up_parameters_weight_, l_self_modules_up_parameters_bias_);  l_self_modules_up_parameters_weight_ = l_self_modules_up_parameters_bias_ = None
        hidden: "f32[3, 96]" = torch.relu(linear);  linear = None

        # File: tests/models/block.py:16 in forward, code: out = x + self.down(hidden)
        linear_1: "f32[3, 48]" = torch._C._nn.linear(hidden, l_self_modules_down_parameters_weight_, None);  hidden = l_self_modules_down_parameters_weight_ = None
        out: "f32[3, 48]" = l_x_ + linear_1;  l_x_ = linear_1 = None

        # File: tests/models/block.py:17 in forward, code: return self.lm_head(out)
        linear_2: "f32[3, 64]" = torch._C._nn.linear(out, l_self_modules_lm_head_parameters_weight_, l_self_modules_lm_head_parameters_bias_);  out = l_self_modules_lm_head_parameters_weight_ = l_self_modules_lm_head_parameters_bias_ = None
        return (linear_2,)

